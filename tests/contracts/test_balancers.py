"""Balancers together: what perfect balance and collapse read (B7), and what is refused.

Values and slopes of their losses are in test_balancer_losses.py, what they keep from step to step in test_balancer_state.py.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contracts import balanced

from moejax import config
from moejax.errors import ConfigError
from moejax.moe import balancers
from moejax.moe.balancers import BALANCERS

pytestmark = pytest.mark.usefixtures("strict_dtypes")

E, N = 8, 64
LOAD = BALANCERS["load_balance"].loss


def ranked(ranks, width=E):
    """Logits [1, N, width] of tokens that choose ranks[i] in order: the first choice stands out most."""
    logits = np.zeros((1, len(ranks), width), np.float32)
    for i, choices in enumerate(ranks):
        for place, e in enumerate(choices):
            logits[0, i, e] = 3 + 0.25 * (len(choices) - place)
    return logits


def collapsed(k, which, to=0):
    """Choices go round the clock over the other experts, but one choice of every token is always expert `to`."""
    others = [e for e in range(E) if e != to]
    ranks = []
    for i in range(N):
        choices = [others[(i + j) % (E - 1)] for j in range(k)]
        choices[which] = to
        ranks.append(choices)
    return ranks


def sums_of(moe, logits):
    return balanced.of(moe).sums(logits, np.ones(logits.shape[:2], bool))


def check_reads_one_at_balance(k, loss=BALANCERS["load_balance"].loss):
    """Round the clock, every expert is every choice equally often: 1.0. Collapse of any one choice reads more."""
    moe = config.MoE(num_experts=E, top_k=k, renormalize=k > 1)
    sums = sums_of(moe, ranked([[(i + j) % E for j in range(k)] for i in range(N)]))
    assert sums["requests"].tolist() == [N * k // E] * E
    assert float(loss(sums, moe)) == pytest.approx(1, abs=1e-6)
    for which in range(k):
        sums = sums_of(moe, ranked(collapsed(k, which)))
        assert int(sums["requests"][0]) == N
        assert float(loss(sums, moe)) > 1.02, f"choice {which} of {k}"


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_b07_perfect_balance_reads_one(k):
    check_reads_one_at_balance(k)


@pytest.mark.parametrize("share", [None, 0.5])
def test_b07_zero_experts_at_their_share(share):
    """1.0 where columns get their targets, requests and probability alike, and more where experts are even but those of zero
    computation have all the rest."""
    moe = config.MoE(num_experts=6, top_k=1, renormalize=False, zero_experts=("zero",) * 2, zero_share=share)
    target = np.asarray(balancers.targets(moe))
    assert target.sum() == pytest.approx(1) and target[6:].sum() == pytest.approx(0.25 if share is None else share)
    sums = {"requests": (240 * target).round().astype(np.int32), "probability": 240 * target, "tokens": np.array(240)}
    assert float(LOAD(sums, moe)) == pytest.approx(1, abs=1e-6)
    moved = np.array([6] * 6 + [102] * 2)
    sums |= {"requests": moved.astype(np.int32), "probability": moved.astype(np.float32)}
    assert float(LOAD(sums, moe)) > 1.2


def test_b07_uniform_probabilities_do_not_hide_a_dead_expert():
    """All logits equal send every token to expert 0, and P is uniform: the loss reads 1 by its formula, the load says 0."""
    moe = config.MoE(num_experts=E, top_k=1, renormalize=False)
    sums = sums_of(moe, np.zeros((1, N, E), np.float32))
    assert sums["load"].tolist() == [N] + [0] * (E - 1)
    assert float(LOAD(sums, moe)) == pytest.approx(1, abs=1e-6)


def test_b07_opposite_layers_do_not_cancel():
    """Half the layers collapse on expert 0, half on expert 7: averaged as losses they stay high, as sums they would hide."""
    moe = config.MoE(num_experts=E, top_k=1, renormalize=False, load_balance=1.0, router_z=0.0)
    layers = [sums_of(moe, ranked(collapsed(1, 0, to))) for to in range(E)]
    stacked = jax.tree.map(lambda *s: jnp.stack(s), *layers)
    loss, parts = balanced.objective(stacked, moe)
    merged = jax.tree.map(lambda s: jnp.sum(s, axis=0, dtype=s.dtype), stacked)
    each = [float(LOAD(s, moe)) for s in layers]
    assert float(LOAD(merged, moe)) == pytest.approx(1, abs=1e-5)
    assert float(parts["load_balance"]) == pytest.approx(np.mean(each), rel=1e-6)
    assert min(each) > 1.5
    assert float(loss) == pytest.approx(np.mean(each), rel=1e-6)


# ---- rules ------------------------------------------------------------------------------------------------------------

REFUSED = [
    *(({name: value}, [f"model.moe.{name}={value}", "set 0"]) for name in BALANCERS for value in (-1, math.inf)),
    ({"load_balance_scope": "batch"}, ["'batch'", "global, microbatch, group, sequence"]),
    ({"load_balance": 0.0, "load_balance_scope": "group"}, ["load_balance_scope=group", "set model.moe.load_balance=0.01"]),
    ({"load_balance_overflow": 1.0}, ["load_balance_overflow=1.0", "set 0.02"]),
    ({"load_balance": 0.0, "load_balance_overflow": 0.1}, ["load_balance_overflow=0.1", "load_balance=0.01"]),
    ({"zero_share": 0.3}, ["zero_share=0.3 with 0", "set null or model.moe.zero_experts"]),
    ({"zero_share": 1.0, "zero_experts": ("zero",)}, ["zero_share=1.0 with 1", "between 0 and 1"]),
    ({"quantile_bias": 1.5}, ["quantile_bias=1.5", "at most 1", "set 1.0"]),
    ({"quantile_bias": 1.0, "top_k_start": 1, "top_k_steps": 9}, ["top_k_start=1", "sign_bias"]),
    ({"quantile_bias": 1.0, "router_groups": 4, "router_groups_kept": 2}, ["router_groups=4", "balance by sign_bias"]),
    ({"quantile_bias": 1.0, "top_k": 16}, ["top_k=16 of 16", "sign_bias"]),
    ({"sinkhorn": 3}, ["sinkhorn=3", "allow_noncausal=True"]),
    ({"sinkhorn": 3, "allow_noncausal": True, "sign_bias": 0.1}, ["sign_bias=0.1", "set sinkhorn=0"]),
    ({"smooth_load": 0.1, "router": "noisy_topk", "sinkhorn": 2, "allow_noncausal": True}, ["sinkhorn=2", "set smooth_load=0"]),
]  # fmt: skip


@pytest.mark.parametrize("options,words", REFUSED, ids=lambda x: str(x) if isinstance(x, dict) else "")
def test_refused(options, words):
    """What cannot work is one line with the values and the remedy."""
    with pytest.raises(ConfigError) as caught:
        balancers.check(config.MoE(**options))
    message = str(caught.value)
    assert not [word for word in words if word not in message] and "\n" not in message, message


@pytest.mark.parametrize("name", BALANCERS)
def test_each_reads_its_own_option(name):
    """On by its option alone, off at 0."""
    assert name in balancers.active(config.MoE(**{name: 1}))
    assert name not in balancers.active(config.MoE(**{name: 0}))
