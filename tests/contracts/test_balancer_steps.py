"""Do balancers balance? Skewed routers left to one balancer alone, fresh tokens every step."""

import functools

import harness
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contracts import balanced

from moejax import config
from moejax.moe import balancers, diagnostics
from moejax.moe.balancers.bias import SINKHORN
from moejax.moe.routers import ROUTERS

pytestmark = pytest.mark.usefixtures("strict_dtypes")

ALONE = {"load_balance": 0.0, "router_z": 0.0}


def skewed(experts, tokens, skew, rng):
    """Logits [1, tokens, experts]: normal, and expert e less by skew * log e, as frequencies by Zipf."""
    return (rng.normal(size=(1, tokens, experts)) - skew * np.log(np.arange(1, experts + 1))).astype(np.float32)


def rivals(experts, tokens, skew, rng):
    """Experts in pairs, every token torn between the two of one pair, the first of which is ahead by `skew`."""
    logits = rng.normal(size=(1, tokens, experts))
    pair = rng.integers(0, experts // 2, tokens)
    logits[0, np.arange(tokens), 2 * pair] += 12 + skew
    logits[0, np.arange(tokens), 2 * pair + 1] += 12
    return logits.astype(np.float32)


@functools.cache
def advance(moe):
    """(state, logits) -> (state after the step, its sums)."""
    routed = balanced.Routed(moe)
    keeper = ROUTERS[moe.router].keeper

    def step(state, logits):
        sums = routed._sums(logits, jnp.ones(logits.shape[:2], bool), state=state)
        kept = {} if keeper is None else keeper.update(state, sums, moe)
        return state | kept | balancers.update(state, sums, moe), sums

    return jax.jit(step)


def violations(moe, steps, tokens, skew, make=skewed, seed=0):
    """MaxVio of the requests in each of `steps` + 1 steps: before any update, after one, and so on."""
    rng, state, found = np.random.default_rng(seed), balanced.start(moe), []
    for _ in range(steps + 1):
        state, sums = advance(moe)(state, make(moe.num_experts, tokens, skew, rng))
        found.append(float(diagnostics.max_violation(np.asarray(sums["requests"])[None])[0]))
    return found


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_quantile_bias_is_even_within_five_steps(score):
    """MaxVio from above 1 to below 0.1, and it stays there but for the noise of a batch."""
    moe = config.MoE(num_experts=8, top_k=2, score=score, quantile_bias=1.0, **ALONE)
    found = violations(moe, 12, 8192, 1.0)
    assert found[0] > 1 and found[1] < 0.5 and max(found[5:]) < 0.1, found


def test_quantile_bias_does_not_oscillate():
    """Where two experts compete for the same tokens, a full step settles them and does not swap them."""
    moe = config.MoE(num_experts=8, top_k=1, renormalize=False, quantile_bias=1.0, **ALONE)
    found = violations(moe, 8, 16384, 0.5, rivals)
    assert found[0] > 0.25 and max(found[3:]) < 0.1, found


def test_a_smaller_rate_goes_a_smaller_way():
    """At rate 0.25 it takes longer and gets there; the first step is a quarter of the full one."""
    full, quarter = (config.MoE(num_experts=8, top_k=2, quantile_bias=rate, **ALONE) for rate in (1.0, 0.25))
    logits = skewed(8, 8192, 1.0, np.random.default_rng(0))
    steps = [advance(moe)(balanced.start(moe), logits)[0]["quantile_bias"] for moe in (full, quarter)]
    harness.close(4 * steps[1], steps[0])
    found = violations(quarter, 24, 8192, 1.0)
    assert found[4] > 0.2 and found[-1] < 0.1, found


def test_sign_bias_is_even_within_five_hundred_steps():
    """At rate 0.001 on sigmoid scores."""
    moe = config.MoE(num_experts=8, top_k=2, score="sigmoid", sign_bias=0.001, **ALONE)
    found = violations(moe, 500, 4096, 0.7)
    assert found[0] > 0.8 and np.mean(found[-20:]) < 0.1, (found[0], found[-20:])


FULL = {"num_experts": 64, "top_k": 8, **ALONE}
"""16,384 tokens a step. A batch's own noise is a MaxVio of about 0.06."""


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("skew", [0.5, 1.0, 2.0])
@pytest.mark.soak
def test_full_quantile_bias_is_even_within_five_steps(score, skew):
    """64 experts, top 8; at skew 2 expert 0 starts with all tokens, expert 63 with none."""
    found = violations(config.MoE(score=score, quantile_bias=1.0, **FULL), 9, 16384, skew)
    assert found[0] > 4 and min(found[:6]) < 0.1 and np.mean(found[5:]) < 0.1, found


@pytest.mark.soak
def test_full_sign_bias_is_even_within_five_hundred_steps():
    found = violations(config.MoE(score="sigmoid", sign_bias=0.001, **FULL), 500, 16384, 1.0)
    assert found[0] > 4 and np.mean(found[-10:]) < 0.1, (found[0], found[-10:])


# ---- Sinkhorn ---------------------------------------------------------------------------------------------------------


def test_sinkhorn_evens_the_load():
    """After many turns every expert has the same total of the tokens' weights, and as first choice nearly the same load."""
    rng = np.random.default_rng(0)
    logits, valid = skewed(4, 256, 1.0, rng), np.ones((1, 256), bool)
    mix = lambda n: SINKHORN.mix(jnp.asarray(logits), jnp.asarray(valid), config.MoE(sinkhorn=n))  # noqa: E731
    weights = np.exp(np.asarray(mix(100), np.float64))[0]
    np.testing.assert_allclose(weights.sum(axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(weights.sum(axis=0), 64, rtol=1e-3)
    plain, even = (
        np.bincount(np.asarray(scores)[0].argmax(-1), minlength=4).max() / 64 - 1 for scores in (logits, mix(100))
    )
    assert plain > 1 and even < 0.2, (plain, even)


def test_sinkhorn_leaves_padding_out():
    """Invalid tokens, whatever is in them, change no valid token's scores; a group without tokens has no NaN."""
    rng = np.random.default_rng(0)
    logits, valid = skewed(4, 16, 1.0, rng), rng.random((1, 16)) < 0.7
    other = np.where(valid[..., None], logits, 50).astype(np.float32)
    mix = lambda x, v: np.asarray(SINKHORN.mix(jnp.asarray(x), jnp.asarray(v), config.MoE(sinkhorn=5)))  # noqa: E731
    assert (mix(logits, valid)[valid] == mix(other, valid)[valid]).all()
    alone = logits[valid][None]
    harness.close(mix(logits, valid)[valid], mix(alone, np.ones(alone.shape[:2], bool))[0], 1e-6)
    assert np.isfinite(mix(logits, np.zeros_like(valid))).all()


# ---- routers that steer the number of requests ------------------------------------------------------------------------


def test_threshold_brings_requests_to_mean_k():
    """From thresholds of a half, that most or few tokens pass, to mean_k requests a token, evenly; fresh tokens each step."""
    for start in (-1.0, 2.0):
        moe = config.MoE(num_experts=8, top_k=8, router="threshold", mean_k=1.5, **ALONE)
        rng, state, found = np.random.default_rng(0), balanced.start(moe), []
        for _ in range(80):
            state, sums = advance(moe)(state, skewed(8, 2048, 0.5, rng) + np.float32(start))
            found.append(float(sums["requested"]) / 2048)
        assert abs(found[0] - 1.5) > 0.5 and np.mean(found[-10:]) == pytest.approx(1.5, rel=0.05), found
        assert float(diagnostics.max_violation(np.asarray(sums["requests"])[None])[0]) < 0.2


@pytest.mark.parametrize("bias", [-0.5, 1.0])
def test_sparsity_brings_requests_to_mean_k(bias):
    """Logits that a task pulls up, with too few or too many positive at first: the adaptive weight settles their number."""
    moe = config.MoE(num_experts=8, top_k=8, router="relu", mean_k=2.0, sparsity=1e-3, **ALONE)
    routed = balanced.Routed(moe)

    @harness.jit
    def step(shift, state, noise):
        def loss(shift):
            logits = noise + shift[None, None]
            sums = routed._sums(logits, jnp.ones(logits.shape[:2], bool), state=state)
            task = -jnp.mean(jnp.sum(jax.nn.softplus(logits), axis=-1))
            balance = balanced.objective(
                jax.tree.map(lambda s: s[None], sums), moe, jax.tree.map(jnp.atleast_1d, state)
            )
            return task + balance[0], sums

        slope, sums = jax.grad(loss, has_aux=True)(shift)
        return shift - 0.05 * slope, state | balancers.update(state, sums, moe), sums["requested"]

    rng, shift, state, found = np.random.default_rng(0), jnp.full(8, bias, jnp.float32), balanced.start(moe), []
    for _ in range(400):
        shift, state, requested = step(shift, state, rng.normal(size=(1, 256, 8)).astype(np.float32))
        found.append(int(requested) / 256)
    assert abs(found[0] - 2) > 0.4 and np.mean(found[-100:]) == pytest.approx(2, rel=0.1), found[::20]
