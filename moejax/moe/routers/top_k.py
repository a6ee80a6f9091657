"""Routers by which a token takes its k best experts."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moejax import config
from moejax.errors import ConfigError
from moejax.moe.names import ASSIGNMENT, keep
from moejax.moe.records import Choice, Inputs, columns, nothing
from moejax.moe.routers import selection
from moejax.moe.routers.api import Router, by_token, scored, token_choice, weigh_by_score
from moejax.moe.routers.selection import READS, top
from moejax.moe.scores import SCORES, at, noisy_logits, normalized

WARM_UP = frozenset({"top_k_start", "top_k_steps"})


def topk(inputs: Inputs, moe: config.MoE) -> Choice:
    """The k largest selection scores. With score softmax the router of Mixtral, Qwen and OLMoE; with sigmoid and a selection
    bias that of DeepSeek-V3 (Wang et al. 2024, auxiliary-loss-free balancing), optionally limited to groups."""
    return _best(SCORES[moe.score].selection(inputs.logits), inputs, moe)


def _best(scores: Array, inputs: Inputs, moe: config.MoE) -> Choice:
    preference = selection.selection(scores, inputs, moe)
    expert, margin = top(preference, moe.top_k)
    wanted = jnp.arange(moe.top_k, dtype=jnp.int32) < k_now(inputs.step, moe)
    excess, _ = nothing(inputs.valid)
    return Choice(expert, jnp.broadcast_to(wanted[None, None], expert.shape), excess, margin, preference)


def k_now(step: Array, moe: config.MoE) -> Array:
    """Choices made at a step: from top_k_start to top_k in top_k_steps steps, a whole one at a time."""
    start = moe.top_k if moe.top_k_start is None else moe.top_k_start
    done = jnp.minimum(step, moe.top_k_steps)
    return start + (moe.top_k - start) * done // max(moe.top_k_steps, 1)


def switch(inputs: Inputs, moe: config.MoE) -> Choice:
    """One expert, its softmax probability as the gate (Fedus et al. 2021, eq. 2). Input jitter is `moe.jitter`."""
    preference = selection.selection(inputs.logits, inputs, moe)
    expert, margin = top(preference, 1)
    excess, _ = nothing(inputs.valid)
    return Choice(expert, jnp.ones_like(expert, dtype=bool), excess, margin, preference)


def switch_gates(inputs: Inputs, expert: Array, asked: Array, moe: config.MoE) -> Float[Array, "G S K"]:
    """p_e."""
    return at(jax.nn.softmax(inputs.logits), expert) * moe.gate_scale


def gshard(inputs: Inputs, moe: config.MoE) -> Choice:
    """Two experts; in training the second is asked for with probability min(1, 2 g2) (Lepikhin et al. 2020, algorithm 1),
    at evaluation always. ST-MoE (Zoph et al. 2022) is this with capacity factors 1.25 and 2 and the router z-loss."""
    preference = selection.selection(inputs.logits, inputs, moe)
    expert, margin = top(preference, 2)
    wanted = jnp.ones_like(expert, dtype=bool)
    if inputs.noise is not None:
        second = jax.lax.stop_gradient(_pair(inputs, expert)[..., 1])
        wanted = wanted.at[..., 1].set(keep(2 * second > inputs.noise[..., 0], ASSIGNMENT))
    excess, _ = nothing(inputs.valid)
    return Choice(expert, wanted, excess, margin, preference)


def _pair(inputs: Inputs, expert: Array) -> Array:
    return normalized(at(jax.nn.softmax(inputs.logits), expert), jnp.ones_like(expert, dtype=bool))


def gshard_gates(inputs: Inputs, expert: Array, asked: Array, moe: config.MoE) -> Float[Array, "G S K"]:
    """Softmax probabilities divided by the sum of both, asked for or not."""
    return _pair(inputs, expert) * moe.gate_scale


def noisy_topk(inputs: Inputs, moe: config.MoE) -> Choice:
    """The k largest of noisy logits, the noise's size learned (Shazeer et al. 2017, eq. 3 to 5)."""
    return _best(noisy_logits(inputs), inputs, moe)


def noisy_gates(inputs: Inputs, expert: Array, asked: Array, moe: config.MoE) -> Float[Array, "G S K"]:
    """Softmax of the noisy logits over the wanted choices."""
    chosen = at(noisy_logits(inputs), expert)
    wanted = asked | ~jnp.any(asked, axis=-1, keepdims=True)
    return jax.nn.softmax(jnp.where(wanted, chosen, -jnp.inf)) * moe.gate_scale


def dense(inputs: Inputs, moe: config.MoE) -> Choice:
    """Every expert for every token (Jacobs et al. 1991; Jordan and Jacobs 1994)."""
    experts = jnp.arange(moe.num_experts, dtype=jnp.int32)
    excess, margin = nothing(inputs.valid)
    wanted = jnp.ones_like(inputs.logits, dtype=bool)
    expert = jnp.broadcast_to(experts[None, None], inputs.logits.shape)
    return Choice(expert, wanted, excess, margin, jax.lax.stop_gradient(inputs.logits))


# ---- their rules --------------------------------------------------------------------------------------------------


def _check_topk(moe: config.MoE) -> None:
    selection.check(moe)
    _check_warm_up(moe)
    check_gate_moves(moe)
    if moe.score == "constant":
        raise ConfigError(
            f"model.moe.score=constant with model.moe.router={moe.router}: no gate could move with its logit, and the router would "
            f"get no gradient from the task; choose another score"
        )


def check_gate_moves(moe: config.MoE) -> None:
    """A gate divided by itself is the constant 1."""
    least = moe.top_k if moe.top_k_start is None else moe.top_k_start
    if least == 1 and (SCORES[moe.score].after or (moe.renormalize and moe.score != "constant")):
        raise ConfigError(
            f"model.moe.top_k={moe.top_k} (from {least}) with score={moe.score}, renormalize={moe.renormalize}: the gate of one choice "
            f"is always 1 and the router gets no gradient from the task; set model.moe.renormalize=False and another score "
            f"than softmax_after, or model.moe.router=switch"
        )
    if SCORES[moe.score].after and not moe.renormalize:
        raise ConfigError(
            "model.moe.renormalize=False with score=softmax_after: a softmax over the chosen sums to 1; set score=softmax"
        )


def _check_warm_up(moe: config.MoE) -> None:
    start, steps = moe.top_k_start, moe.top_k_steps
    if (start is None) != (steps == 0) or steps < 0 or (start is not None and not 1 <= start <= moe.top_k):
        raise ConfigError(
            f"model.moe.top_k_start={start}, top_k_steps={steps}: a start between 1 and top_k={moe.top_k} and a number of steps "
            f"above 0, or null and 0 for no warm-up"
        )


def _check_noisy(moe: config.MoE) -> None:
    selection.check(moe)
    _check_warm_up(moe)
    if moe.smooth_load and moe.top_k_start is not None:
        raise ConfigError(
            f"model.moe.smooth_load={moe.smooth_load} with top_k_start={moe.top_k_start}: the expected load is that of a fixed "
            f"number of choices; set top_k_start=null, or balance by importance"
        )
    if min(moe.top_k, moe.top_k_start or moe.top_k) == 1:
        raise ConfigError(
            f"model.moe.router=noisy_topk with top_k={moe.top_k}, top_k_start={moe.top_k_start}: a softmax over one choice is always 1; "
            f"set model.moe.top_k=2 or more"
        )


def exactly(k: int):
    """The router chooses k, not what top_k says."""

    def check(moe: config.MoE) -> None:
        selection.check(moe)
        if moe.top_k != k:
            raise ConfigError(f"model.moe.router={moe.router} chooses {k}; set model.moe.top_k={k} (it is {moe.top_k})")

    return check


def _check_dense(moe: config.MoE) -> None:
    if moe.top_k != moe.num_experts:
        raise ConfigError(
            f"model.moe.router=dense asks every expert; set model.moe.top_k={moe.num_experts} (it is {moe.top_k})"
        )


def of_softmax(inputs: Inputs, moe: config.MoE) -> Float[Array, "G S X"]:
    """Softmax probabilities, whatever `score` says."""
    return jax.nn.softmax(inputs.logits)


TOPK = Router(
    token_choice(topk, scored),
    weigh_by_score,
    causal=True,
    reads=READS | WARM_UP | {"score", "renormalize"},
    check=_check_topk,
)
SWITCH = Router(
    token_choice(switch, of_softmax),
    by_token(switch_gates),
    causal=True,
    reads=READS,
    check=exactly(1),
    distribution=of_softmax,
)
GSHARD = Router(
    token_choice(gshard, of_softmax),
    by_token(gshard_gates),
    causal=True,
    reads=READS,
    check=exactly(2),
    distribution=of_softmax,
    noise=lambda moe: 1,
)
NOISY = Router(
    token_choice(noisy_topk, lambda inputs, moe: jax.nn.softmax(noisy_logits(inputs))),
    by_token(noisy_gates),
    causal=True,
    reads=READS | WARM_UP | {"smooth_load"},
    check=_check_noisy,
    distribution=of_softmax,
    heads=lambda moe: {"logits": columns(moe), "spread": columns(moe)},
    noise=columns,
)
DENSE = Router(
    token_choice(dense, of_softmax), by_token(switch_gates), causal=True, check=_check_dense, distribution=of_softmax
)
