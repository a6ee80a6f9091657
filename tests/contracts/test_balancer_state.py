"""What balancers keep from step to step: each rule against NumPy, quantiles from counts, and biases that only select (B11)."""

import functools

import harness
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contracts import balanced
from train import replayed

from moejax import config
from moejax.moe import quantile, scores
from moejax.moe.balancers import BALANCERS
from moejax.moe.balancers.bias import gaps
from moejax.moe.routers import ROUTERS
from moejax.train import routing

pytestmark = pytest.mark.usefixtures("strict_dtypes")

ZERO = {"zero_experts": ("identity", "zero"), "zero_share": 0.4}
CASES = {
    "sign_bias": {"sign_bias": 0.01, "score": "sigmoid", **ZERO},
    "quantile_bias": {"quantile_bias": 1.0, **ZERO},
    "quantile_bias sigmoid": {"quantile_bias": 0.5, "score": "sigmoid", "router_dropout": 0.1},
    "load_balance_weight": {"load_balance_overflow": 0.1},
    "sparsity_weight": {"router": "relu", "sparsity": 1e-8, "mean_k": 1.2},
    "threshold": {"router": "threshold", **ZERO},
}
"""By the name of the state and what sets the case apart; a new state joins by a line here and a rule in replayed.RULES."""


def moe_of(case):
    return config.MoE(**{"num_experts": 4, "top_k": 2} | CASES[case])


def test_every_state_has_a_case():
    kept = {name for case in CASES for name in balanced.start(moe_of(case))}
    assert kept == {case.split()[0] for case in CASES} == set(replayed.RULES)
    everything = config.MoE(**{name: 1 for name in BALANCERS}, load_balance_overflow=0.1)
    every = {name for b in BALANCERS.values() for name in b.init(everything)}
    assert kept == every | {n for r in ROUTERS.values() if r.keeper for n in r.keeper.init(everything)}


@pytest.mark.parametrize("case", CASES)
def test_a_rule_equals_numpy(case):
    """Five steps on tokens of which a fifth are invalid, the third without any: the state as plain NumPy has it."""
    moe = moe_of(case)
    now, wanted = balanced.start(moe), jax.tree.map(np.float64, balanced.start(moe))
    update = harness.jit(lambda state, sums, step: routing.update({"sparse": state}, {"sparse": sums}, moe, step))
    now |= {"last_fed": jnp.zeros(4 + len(moe.zero_experts), jnp.int32)}
    wanted |= {"last_fed": np.zeros(4 + len(moe.zero_experts), int)}
    first = now
    for step in range(1, 6):
        logits, valid, noise, spread = balanced.problem(moe, seed=step)
        sums = balanced.of(moe).sums(logits * 0.3, valid & (step != 3), noise, spread, now)
        layers = update(*jax.tree.map(lambda x: x[None], (now, sums)), jnp.int32(step))["sparse"]
        now = jax.tree.map(lambda x: x[0], layers)
        wanted = wanted | replayed.after(wanted, jax.tree.map(np.asarray, sums), moe, step)
        for name, value in wanted.items():
            harness.close(now[name], value, what=f"{name} after step {step}")
    name = case.split()[0]
    assert (np.asarray(now[name]) != first[name]).any(), "something moved"


def test_fed_is_a_tenth_of_the_fair_share():
    """An expert is fed at `alarm_share` of its target and above; where nothing was routed, everybody is."""
    moe = config.MoE(num_experts=4, alarm_share=0.5, zero_experts=("zero",), zero_share=0.5)
    fed = routing.fed({"load": jnp.asarray([10, 9, 40, 21, 80], jnp.int32)}, moe)
    assert fed.tolist() == [True, False, True, True, True]
    assert routing.fed({"load": jnp.zeros(5, jnp.int32)}, moe).all()


def overflowing(share, of=1000):
    """Requests of four experts, of which this share lies past 1.25 fair shares."""
    most = 1.25 * of / 4 + share * of
    return jnp.asarray([most, *[(of - most) / 3] * 3], jnp.float32).astype(jnp.int32)


def test_the_adaptive_weight_follows_the_overflow():
    """It grows past the target and shrinks below it, 2 % a step, and stays within 1/64 and 64; no tokens, no change."""
    moe = config.MoE(num_experts=4, load_balance_overflow=0.1)
    move = harness.jit(lambda w, r, n: BALANCERS["load_balance"].update(
        {"load_balance_weight": w}, {"requests": r, "tokens": n}, moe)["load_balance_weight"])  # fmt: skip
    some, weight = jnp.int32(500), jnp.float32(1)
    assert float(move(weight, overflowing(0.11), some)) == pytest.approx(1.02)
    assert float(move(weight, overflowing(0.09), some)) == pytest.approx(1 / 1.02)
    assert float(move(weight, overflowing(0.0) * 0, jnp.int32(0))) == 1
    assert float(move(jnp.float32(64), overflowing(0.2), some)) == 64
    assert float(move(jnp.float32(1 / 64), overflowing(0.0), some)) == 1 / 64


def test_the_sparsity_weight_stays_finite():
    """A thousand steps one way neither overflow nor vanish, so that it can come back."""
    moe = config.MoE(num_experts=4, router="relu", sparsity=1e-8)
    for positive in (0, 10):
        stats = {"positive": jnp.full(4, positive, jnp.int32), "tokens": jnp.int32(10)}
        step = lambda _, state: BALANCERS["sparsity"].update(state, stats, moe)  # noqa: E731
        weight = jax.lax.fori_loop(0, 1000, step, {"sparsity_weight": jnp.float32(1)})["sparsity_weight"]
        assert float(weight) == pytest.approx(1e-12 if positive == 0 else 1e12)


# ---- biases -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sign_bias", "quantile_bias"])
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_a_bias_shifts_selection_and_never_the_gate(name, score):
    """An expert with a large bias is everybody's first choice, one with a very negative bias nobody's; gates are scores."""
    moe = config.MoE(num_experts=4, top_k=2, score=score, renormalize=False, **{name: 0.1})
    logits, valid, _, _ = balanced.problem(moe)
    state = {name: jnp.asarray([0, 30, -30, 0], jnp.float32)}
    seen = harness.jit(functools.partial(balanced.of(moe).seen, noise=None, spread=None))(logits, valid, state=state)
    expert = np.asarray(seen.routed.expert).reshape(*valid.shape, 2)
    assert (expert[..., 0] == 1).all() and not (expert == 2).any()
    plain = np.asarray(scores.SCORES[score].score(jnp.asarray(logits)))
    harness.close(seen.assignment.gate.reshape(*valid.shape, 2), np.take_along_axis(plain, expert, -1), 1e-6)


def test_gaps_are_distances_to_the_threshold():
    """Halfway between the k-th and the next; a bias that rises by a little more than the gap makes the choice."""
    scores_ = np.random.default_rng(0).normal(size=(1, 50, 6)).astype(np.float32)
    scores_[0, 0, 1:5], scores_[0, 1, 2:] = -np.inf, -np.inf
    found = np.asarray(gaps(jnp.asarray(scores_), 2))
    ordered = np.sort(scores_, axis=-1)[..., ::-1]
    for i in range(50):
        threshold = (ordered[0, i, 1] + ordered[0, i, 2]) / 2
        for e in range(6):
            wanted = threshold - scores_[0, i, e] if np.isfinite(scores_[0, i, e]) else np.inf
            assert found[0, i, e] == pytest.approx(wanted, abs=1e-6)
            if np.isfinite(wanted):
                chosen = np.argsort(-scores_[0, i])[:2]
                assert (e in chosen) == (wanted < 0)
    assert (found[0, 0] == [-np.inf, *[np.inf] * 4, -np.inf]).all(), "two are left: both are chosen whatever their bias"


# ---- quantiles --------------------------------------------------------------------------------------------------------


@functools.cache
def compiled(reach):
    """(values, valid, share of each column) -> (counts below the rungs, quantiles)."""
    rungs = quantile.ladder(reach)

    def run(values, valid, share):
        counts = quantile.below(values, valid, rungs)
        return counts, quantile.at(counts, jnp.sum(valid, dtype=jnp.int32), share, rungs)

    return harness.jit(run)


def quantiles(values, valid, share, rungs):
    share = np.broadcast_to(np.float32(share), values.shape[-1:])
    return np.asarray(compiled(float(rungs[-1]))(np.float32(values), valid, share)[1])


@pytest.mark.parametrize("rungs", [quantile.SIGMOID, quantile.LOGITS], ids=["sigmoid", "logits"])
@pytest.mark.parametrize("share", [0.02, 0.25, 0.5, 0.9, 1.0])
def test_quantiles_to_the_ladders_resolution(rungs, share):
    """NumPy's quantile of the valid values, no further off than the distance of the rungs around it."""
    rng = np.random.default_rng(0)
    values = (rng.normal(size=(4, 100, 3)) * [0.02, 0.2, 0.4] * rungs[-1] / 2).clip(-rungs[-1], rungs[-1])
    valid = rng.random((4, 100)) < 0.7
    found = quantiles(values, valid, share, rungs)
    for e in range(3):
        wanted = np.quantile(values[..., e][valid], share, method="inverted_cdf")
        upper = np.clip(np.searchsorted(rungs, wanted), 1, len(rungs) - 1)
        assert rungs[upper - 1] - 1e-6 <= found[e] <= rungs[min(upper + 1, len(rungs) - 1)] + 1e-6


def test_quantiles_at_the_ends():
    """Beyond the ladder the outermost rung; share 0 the lowest; 0 of no values; shares by column; infinities count."""
    rungs, ones = quantile.LOGITS, np.ones((1, 10), bool)
    assert quantiles(np.full((1, 10, 1), 99.0), ones, 0.5, rungs) == rungs[-1]
    assert quantiles(np.full((1, 10, 1), -99.0), ones, 0.5, rungs) == rungs[0]
    assert quantiles(np.zeros((1, 10, 1)), ones, 0.0, rungs) == rungs[0]
    assert quantiles(np.zeros((1, 10, 1)), ~ones, 0.5, rungs) == 0
    spread = np.linspace(-1, 1, 10)[None, :, None].repeat(2, axis=2)
    low, high = quantiles(spread, ones, [0.2, 0.8], rungs)
    assert low < -0.5 and high > 0.5
    spread[0, :6, 0], spread[0, :6, 1] = np.inf, -np.inf
    assert quantiles(spread, ones, 0.5, rungs).tolist() == [rungs[-1], rungs[0]]


def test_counts_of_shards_add():
    """Counts below the rungs are integers that add over any cut of the tokens, and padding adds none."""
    rng = np.random.default_rng(1)
    values, valid = rng.normal(size=(6, 20, 3)).astype(np.float32), rng.random((6, 20)) < 0.7
    count = lambda x, v: np.asarray(compiled(8.0)(x, v, np.full(3, 0.5, np.float32))[0])  # noqa: E731
    whole = count(values, valid)
    np.testing.assert_array_equal(sum(count(values[i : i + 2], valid[i : i + 2]) for i in (0, 2, 4)), whole)
    np.testing.assert_array_equal(whole, (values[valid][..., None] < quantile.LOGITS).sum(axis=0))
    padded = np.concatenate([values, np.full_like(values, np.nan)]), np.concatenate([valid, np.zeros_like(valid)])
    np.testing.assert_array_equal(count(*padded), whole)


def test_the_ladder():
    """Odd, rising, finest at 0, where a settled bias reads its last digits."""
    for rungs in (quantile.SIGMOID, quantile.LOGITS):
        steps = np.diff(rungs)
        assert (steps > 0).all() and steps.argmin() in (31, 32) and rungs[32] == 0
        np.testing.assert_allclose(rungs, -rungs[::-1])
    assert np.diff(quantile.SIGMOID).min() < 1e-3 and np.diff(quantile.LOGITS).min() < 1e-2
