"""Places on arbitrary choices against a loop: every order and rerouting, limits from none to all, columns without a limit (B4)."""

import dataclasses

import cases
import harness
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from moejax.arrays import NOWHERE
from moejax.moe import places
from moejax.moe.records import Choice, columns

pytestmark = pytest.mark.usefixtures("strict_dtypes")

GROUPS, SIZE, K = 120, 7, 3


def arbitrary(moe, distinct):
    """Choices of no router: experts repeated within a token unless `distinct`, requests not made, tied preferences and priorities."""
    rng, width = np.random.default_rng(2), columns(moe)
    if distinct:
        expert = np.argsort(rng.random((GROUPS, SIZE, width)), axis=-1)[..., :K]
    else:
        expert = rng.integers(0, width, (GROUPS, SIZE, K))
    expert[: GROUPS // 4] = expert[: GROUPS // 4, :1]
    preference = rng.integers(-2, 3, (GROUPS, SIZE, width)).astype(np.float32)
    preference[rng.random(preference.shape) < 0.1] = -np.inf
    return (
        expert.astype(np.int32), rng.random(expert.shape) < 0.8, rng.random((GROUPS, SIZE)) < 0.7, preference,
        rng.integers(0, SIZE + 1, GROUPS).astype(np.int32), (rng.integers(0, 5, (GROUPS, SIZE)) / 4).astype(np.float32),
    )  # fmt: skip


@pytest.mark.parametrize("order", [*places.ORDERS, "reroute"])
def test_b04_places_equal_a_loop(order):
    """120 groups. The rank of a request, who is without a place, where it goes instead."""
    reroute = order == "reroute"
    moe = cases.configure("topk", top_k=K, order="position" if reroute else order, reroute=reroute)
    expert, wanted, valid, preference, limit, priority = arbitrary(moe, distinct=reroute)
    nothing = np.zeros((GROUPS, SIZE))
    choice = Choice(*map(jnp.asarray, (expert, wanted, nothing.astype(np.int32), harness.f32(nothing), preference)))
    arguments = choice, jnp.asarray(valid), jnp.asarray(limit), jnp.asarray(priority)
    routed = harness.jit(lambda *a: places.place(*a, moe))(*arguments)
    final, slot = (np.asarray(a).reshape(expert.shape) for a in (routed.expert, routed.slot))
    spec = dataclasses.replace(harness.spec_of(moe, 1.0), k=K)
    moved = 0
    for g in range(GROUPS):
        asked = wanted[g] & valid[g][:, None]
        queue = oracle.queue(asked, priority[g], spec)
        to, rank = oracle.place(queue, expert[g], asked, preference[g], limit[g], spec)
        np.testing.assert_array_equal(np.where(slot[g] == NOWHERE, -1, slot[g]), rank)
        np.testing.assert_array_equal(final[g], to)
        moved += ((to != expert[g]) & (rank >= 0)).sum()
    assert (moved > 0) == reroute
    np.testing.assert_array_equal(np.asarray(routed.original).reshape(expert.shape), expert)
    np.testing.assert_array_equal(np.asarray(routed.asked).reshape(expert.shape), wanted & valid[..., None])
    assert (np.asarray(routed.token).reshape(expert.shape) == np.arange(SIZE)[None, :, None]).all()
