"""Every backend of the grouped matmul against NumPy float64 in values and gradients (B14)."""

import functools

import harness
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.errors import ConfigError
from moejax.kernels.grouped_matmul import BACKENDS, backend, grouped_matmul, grouped_matmul_dw, pick

pytestmark = pytest.mark.usefixtures("strict_dtypes")

PLAIN = [name for name in BACKENDS if backend(name).platform is None]
"""Those whose kernels are not interpreted here; the others have batteries of their own, and go through the interface below."""
M, K, N = 301, 6, 5  # several blocks of whatever size, and a part of one
SIZES = {
    1: {"all": [M], "part": [200], "none": [0]},
    3: {
        "blocks": [128, 1, 128],
        "empty first": [0, 130, 40],
        "last only": [0, 0, 257],
        "none": [0, 0, 0],
        "all": [129, 1, M - 130],
    },
    8: {
        "mixed": [5, 0, 127, 0, 1, 128, 20, 3],
        "one hot": [0, 0, 0, M, 0, 0, 0, 0],
        "last only": [0, 0, 0, 0, 0, 0, 0, 9],
        "even": [M // 8] * 8,
    },
}
TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}


def spans(sizes):
    """(group, its rows as a slice)."""
    stops = np.cumsum(sizes)
    return [(g, slice(stop - size, stop)) for g, (size, stop) in enumerate(zip(sizes, stops, strict=True))]


@functools.cache
def matmul(impl, transpose=False):
    """Jitted (x, w, sizes, dy) -> y, (dx, dw), with the rows past the last group left out of the loss by selection."""

    def value(x, w, sizes, dy):
        y = grouped_matmul(x, w, sizes, transpose_w=transpose, impl=impl)
        live = jnp.arange(x.shape[0], dtype=jnp.int32)[:, None] < jnp.sum(sizes, dtype=jnp.int32)
        return jnp.sum(jnp.where(live, y.astype(jnp.float32) * dy, 0)), y

    def both(x, w, sizes, dy):
        (_, y), gradients = jax.value_and_grad(value, argnums=(0, 1), has_aux=True)(x, w, sizes, dy)
        return y, gradients

    return harness.jit(both)


def operands(groups, dtype="float32", seed=0):
    rng = np.random.default_rng(seed)
    x, w, dy = (rng.normal(size=s) for s in ((M, K), (groups, K, N), (M, N)))
    return jnp.asarray(x, dtype), jnp.asarray(w, dtype), jnp.asarray(dy, jnp.float32)


def in_numpy(x, w, sizes, dy):
    x, w, dy = (np.asarray(a, np.float64) for a in (x, w, dy))
    y, dx, dw = np.zeros((M, N)), np.zeros((M, K)), np.zeros_like(w)
    for g, rows in spans(sizes):
        y[rows], dx[rows], dw[g] = x[rows] @ w[g], dy[rows] @ w[g].T, x[rows].T @ dy[rows]
    return y, dx, dw


def compare(impl, groups, sizes, dtype):
    x, w, dy = operands(groups, dtype)
    out = matmul(impl)(x, w, jnp.asarray(sizes, jnp.int32), dy)
    again = matmul(impl)(x, w, jnp.asarray(sizes, jnp.int32), dy)
    live = sum(sizes)
    out, again = ((y[:live], slopes) for y, slopes in (out, again))
    for a, b in zip(jax.tree.leaves(out), jax.tree.leaves(again), strict=True):
        assert a.dtype == dtype
        np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))
    y, (dx, dw) = (jax.tree.map(lambda a: np.asarray(a, np.float64), part) for part in out)
    y_, dx_, dw_ = in_numpy(x, w, sizes, dy)
    harness.close(y[:live], y_[:live], TOLERANCE[dtype], "y")
    harness.close(dx, dx_, TOLERANCE[dtype], "dx")
    harness.close(dw, dw_, TOLERANCE[dtype], "dw")
    for g, rows in spans(sizes):
        assert rows.stop > rows.start or not dw[g].any(), f"group {g} is empty and has a gradient"


@pytest.mark.parametrize("groups", SIZES)
@pytest.mark.parametrize("impl", PLAIN)
def test_matches_numpy(impl, groups):
    """fp32, bit-equal when run twice; empty groups get exactly zero gradient and rows past the groups too."""
    for sizes in SIZES[groups].values():
        compare(impl, groups, sizes, "float32")


@pytest.mark.parametrize("impl", PLAIN)
def test_matches_numpy_in_bfloat16(impl):
    for sizes in SIZES[8].values():
        compare(impl, 8, sizes, "bfloat16")


@pytest.mark.parametrize("impl", PLAIN)
def test_random_sizes(impl):
    """Group sizes drawn at random, half of them empty: one compilation, many cuts."""
    rng = np.random.default_rng(5)
    for _ in range(20):
        shares = rng.dirichlet(np.full(8, 0.3)) * (rng.random(8) < 0.7)
        compare(impl, 8, [int(s) for s in shares * rng.integers(0, M + 1)], "float32")


@pytest.mark.parametrize("impl", PLAIN)
def test_b14_nan_past_the_last_group(impl):
    """Rows that no group owns may hold NaN, in the operand and in the cotangent, and nothing else changes by a bit."""
    x, w, dy = operands(8)
    sizes = SIZES[8]["mixed"]
    live = sum(sizes)
    y, (dx, dw) = matmul(impl)(x.at[live:].set(0), w, jnp.asarray(sizes, jnp.int32), dy)
    y_, (dx_, dw_) = matmul(impl)(x.at[live:].set(jnp.nan), w, jnp.asarray(sizes, jnp.int32), dy)
    for a, b in ((y[:live], y_[:live]), (dx, dx_), (dw, dw_)):
        assert np.isfinite(b).all()
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("impl", PLAIN)
def test_transposed_weights(impl):
    x, w, dy = operands(3)
    sizes = jnp.asarray(SIZES[3]["blocks"], jnp.int32)
    y, (dx, dw) = matmul(impl)(x, w, sizes, dy)
    y_, (dx_, dw_) = matmul(impl, True)(x, w.swapaxes(1, 2), sizes, dy)
    live = int(sizes.sum())
    harness.close(y_[:live], y[:live])
    harness.close(dx_, dx)
    harness.close(dw_.swapaxes(1, 2), dw)


@pytest.mark.parametrize("impl", PLAIN)
def test_a_part_of_the_groups(impl):
    """Weights of groups 3, 4 and 5 of eight, with a bias: values and gradients of their rows alone, exactly zero for the others."""
    x, w, dy = operands(8)
    bias = jnp.asarray(np.random.default_rng(2).normal(size=(8, N)), jnp.float32)
    sizes, mine = SIZES[8]["mixed"], slice(3, 6)
    rows = slice(sum(sizes[:3]), sum(sizes[:6]))
    own = np.zeros((M, 1), bool)
    own[rows] = True

    def value(x, w, bias):
        y = grouped_matmul(x, w, jnp.asarray(sizes, jnp.int32), bias=bias, group_offset=jnp.int32(3), impl=impl)
        return jnp.sum(jnp.where(own, y * dy, 0)), y

    (_, y), (dx, dw, d_bias) = harness.jit(jax.value_and_grad(value, (0, 1, 2), has_aux=True))(x, w[mine], bias[mine])
    only = [size if 3 <= g < 6 else 0 for g, size in enumerate(sizes)]
    shifted = [x[rows.start :], w, [0, 0, 0, *sizes[3:6], 0, 0], dy[rows.start :]]
    y_, dx_, dw_ = in_numpy(
        *(np.pad(a, ((0, rows.start), (0, 0))) if i in (0, 3) else a for i, a in enumerate(shifted))
    )
    group = np.repeat(np.arange(8), only)
    harness.close(y[rows], y_[: sum(only)] + np.asarray(bias)[group], what="y")
    harness.close(dx[rows], dx_[: sum(only)], what="dx")
    harness.close(dw, dw_[mine], what="dw")
    harness.close(d_bias, [np.asarray(dy)[rows][group == g].sum(0) for g in (3, 4, 5)], what="bias")
    assert not np.asarray(dx)[~own[:, 0]].any()


@pytest.mark.parametrize("impl", PLAIN)
def test_weight_gradient_alone(impl):
    """On top of what is there, for a part of the groups, in another type; nothing is added for an empty group."""
    x, w, dy = operands(8)
    sizes = jnp.asarray(SIZES[8]["mixed"], jnp.int32)
    _, _, wanted = in_numpy(x, w, SIZES[8]["mixed"], dy)
    harness.close(grouped_matmul_dw(x, dy, sizes, impl=impl), wanted, what="dw")
    some = grouped_matmul_dw(x, dy, sizes, groups=2, group_offset=1, accumulate_into=w[1:3], impl=impl)
    harness.close(some, np.asarray(w[1:3]) + wanted[1:3], what="accumulated")
    np.testing.assert_array_equal(some[0], w[1])


def test_a_part_of_the_groups_must_be_named():
    x, w, _ = operands(3)
    with pytest.raises(ValueError, match="8 group sizes for 3 weights: give group_offset"):
        grouped_matmul(x, w, jnp.zeros(8, jnp.int32), impl="blocked")


@pytest.mark.parametrize("impl", sorted(set(BACKENDS) - set(PLAIN)))
def test_kernels_through_the_interface(impl):
    """Interpreted, with their gradients: the same battery, one cut of the rows."""
    compare(impl, 3, SIZES[3]["empty first"], "float32")


def test_unknown_backend():
    with pytest.raises(ConfigError, match="choose auto or one of"):
        pick("cuda")
    assert pick("auto", "cpu") in BACKENDS
    assert pick("auto", "tpu") in BACKENDS
