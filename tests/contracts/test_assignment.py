"""Groups and exact capacities (B19)."""

from fractions import Fraction

import jax.numpy as jnp
import numpy as np
import pytest

from moejax import config
from moejax.arrays import NOWHERE
from moejax.errors import ConfigError
from moejax.moe import assignment

pytestmark = pytest.mark.usefixtures("strict_dtypes")


@pytest.mark.parametrize(
    "options", [{}, {"group_rows": 2}, {"group_rows": 3}, {"group_window": 4}, {"group_window": 1}]
)
@pytest.mark.parametrize("rest", [(), (5,)])
def test_ungroup_inverts_group(options, rest):
    x = jnp.arange(6 * 8 * int(np.prod(rest)), dtype=jnp.int32).reshape(6, 8, *rest)
    moe = config.MoE(**options)
    grouped = assignment.group(x, moe)
    np.testing.assert_array_equal(assignment.ungroup(grouped, moe, 8), x)
    assert np.sort(np.ravel(grouped)).tolist() == np.ravel(x).tolist()


def test_order_within_a_group():
    """Rows that share a group are ordered by position, then row; windows do not cross rows."""
    x = jnp.arange(4 * 3, dtype=jnp.int32).reshape(4, 3)
    assert assignment.group(x, config.MoE(group_rows=2)).tolist() == [[0, 3, 1, 4, 2, 5], [6, 9, 7, 10, 8, 11]]
    assert assignment.group(x, config.MoE(group_window=1)).tolist() == [[i] for i in range(12)]


def test_capacity_is_an_exact_rational():
    """ceil(factor * k * tokens / experts) with the factor as written: 1.1 is 11/10, not the binary float above it."""
    assert assignment.capacity(1.1, 1, 1, 10) == 10
    assert assignment.capacity(1.1, 1, 11, 100) == 10
    rng = np.random.default_rng(0)
    factors = [1.1, 0.1, 0.7, 1.25, 1.0, 3.3, 1e-3, 0.333, 2.2, 1.0000001]
    tokens = np.concatenate([rng.integers(0, 400, 40), np.arange(11) * 10]).astype(np.int32)
    for factor in factors:
        for k, experts in ((1, 10), (2, 8), (8, 64), (3, 7)):
            exact = [min(int(-((-Fraction(str(factor)) * k * int(n) / experts) // 1)), int(n)) for n in tokens]
            assert [assignment.capacity(factor, k, experts, int(n)) for n in tokens] == exact
            if Fraction(str(factor)).numerator * k * 400 <= NOWHERE:
                np.testing.assert_array_equal(assignment.capacity(factor, k, experts, jnp.asarray(tokens)), exact)
    assert assignment.capacity(None, 2, 8, 5) == 5


def test_b19_capacity_near_the_int32_limit():
    """Products up to 2^31 are exact, and the check refuses what would pass it, in the numerator or the denominator."""
    for tokens in (2**31 // 10 - 1, 2**30 // 9):
        exact = min(-(-9 * tokens // 80), tokens)
        assert int(assignment.capacity(0.9, 1, 8, jnp.asarray([tokens], jnp.int32))[0]) == exact
    for factor in (1.234567891, 1e-9, float("inf"), float("nan"), 0.0, -1.0):
        with pytest.raises(ConfigError, match="capacity_factor"):
            assignment.check(config.MoE(capacity_factor=factor), context=128)
    assignment.check(config.MoE(capacity_factor=1.25), context=4096)


@pytest.mark.parametrize(
    "options", [{"group_rows": 0}, {"group_window": 3}, {"group_window": 0}, {"group_rows": 2, "group_window": 4}]
)
def test_b31_groups_that_cannot_be(options):
    with pytest.raises(ConfigError, match=r"model\.moe\.group_"):
        assignment.check(config.MoE(**options), context=8)
