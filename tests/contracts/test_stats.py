"""Every router statistic equals the oracle's, over valid tokens only."""

import functools

import harness
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from moejax import config
from moejax.arrays import NOWHERE, Assignment
from moejax.moe import assignment, stats
from moejax.moe.router import ROUTERS

pytestmark = pytest.mark.usefixtures("strict_dtypes")

B, T, E = 6, 10, 8
OPTIONS = {"softmax_topk": {"top_k": 3}, "switch": {"top_k": 1}, "gshard": {"top_k": 2}}


@functools.cache
def counted(moe, factor):
    def run(logits, uniform, valid):
        choice = ROUTERS[moe.router].choose(logits, uniform, moe)
        limit = assignment.capacity(factor, moe.top_k, E, jnp.sum(valid, axis=1, dtype=jnp.int32))
        return stats.router_sums(logits, choice, assignment.place(choice, valid, limit, E), valid)

    return harness.jit(run)


@pytest.mark.parametrize("name", ROUTERS)
def test_sums_equal_the_oracles(name):
    """Mixed validity, none, and large logits: integers exactly, reals to 1e-5."""
    moe = config.MoE(num_experts=E, router=name, **OPTIONS[name])
    rng = np.random.default_rng(0)
    uniform = rng.random((B, T)).astype(np.float32) if ROUTERS[name].random else None
    for scale, share in ((1, 0.7), (1, 0.0), (8, 1.0)):
        logits = (scale * rng.normal(size=(B, T, E))).astype(np.float32)
        valid = rng.random((B, T)) < share
        sums = counted(moe, 0.8)(
            jnp.asarray(logits), None if uniform is None else jnp.asarray(uniform), jnp.asarray(valid)
        )
        routing = oracle.route(logits.astype(np.float64), valid, harness.spec_of(moe, 0.8), uniform)
        wanted = oracle.statistics(logits.astype(np.float64), valid, routing)
        assert set(sums) == set(wanted)
        for key in sums:
            harness.close(sums[key], wanted[key], 1e-5, key)


def test_margin_is_zero_where_all_are_chosen():
    moe = config.MoE(num_experts=E, top_k=E)
    sums = counted(moe, None)(jnp.ones((B, T, E), jnp.float32), None, jnp.ones((B, T), bool))
    assert float(sums["margin"]) == 0
    assert sums["load"].tolist() == [B * T] * E


def test_label_table():
    """Kept assignments by label and expert; dropped ones count nowhere."""
    rng = np.random.default_rng(1)
    labels, expert, token = (
        rng.integers(0, 3, (2, 5)),
        rng.integers(0, 4, (2, 10)),
        np.repeat(np.arange(5), 2)[None].repeat(2, 0),
    )
    slot = np.where(rng.random((2, 10)) < 0.6, 0, NOWHERE)
    wanted = np.zeros((3, 4), int)
    for g, a in np.argwhere(slot == 0):
        wanted[labels[g, token[g, a]], expert[g, a]] += 1

    def i32(x):
        return jnp.asarray(x, jnp.int32)

    a = Assignment(i32(token), i32(expert), jnp.ones((2, 10), jnp.float32), i32(slot))
    np.testing.assert_array_equal(stats.label_table(a, i32(labels), 3, 4), wanted)
