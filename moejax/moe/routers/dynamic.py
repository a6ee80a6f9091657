"""Routers by which the number of experts depends on the token, up to the static maximum top_k."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moejax import config
from moejax.arrays import count
from moejax.errors import ConfigError
from moejax.moe import quantile
from moejax.moe.names import ASSIGNMENT, keep
from moejax.moe.records import Choice, Inputs, State, columns, mean_k
from moejax.moe.routers.api import Keeper, Router, by_token, token_choice
from moejax.moe.routers.selection import top
from moejax.moe.routers.top_k import of_softmax, switch_gates
from moejax.moe.scores import at, shares


def top_p(inputs: Inputs, moe: config.MoE) -> Choice:
    """The fewest experts whose probabilities reach top_p together (Huang et al. 2024, "Harder tasks need more experts")."""
    logits = jax.lax.stop_gradient(inputs.logits)
    order, _ = top(logits, logits.shape[-1])
    p = at(jax.nn.softmax(logits), order)
    needed = keep(jnp.cumsum(p, axis=-1) - p < moe.top_p, ASSIGNMENT)
    sorted_ = at(logits, order)
    number = jnp.minimum(count(needed, axis=-1), moe.top_k)
    padded = jnp.concatenate([sorted_, sorted_[..., -1:]], axis=-1)
    gap = jnp.take_along_axis(padded, number[..., None] - 1, axis=-1) - at(padded, number[..., None])
    excess = count(needed[..., moe.top_k :], axis=-1)
    return Choice(order[..., : moe.top_k], needed[..., : moe.top_k], excess, gap[..., 0], logits)


def _above(scores: Float[Array, "G S X"], moe: config.MoE) -> Choice:
    """Experts with a score above 0, largest first, as many as top_k; the others are excess."""
    scores = jax.lax.stop_gradient(scores)
    expert, _ = top(scores, moe.top_k)
    wanted = keep(at(scores, expert) > 0, ASSIGNMENT)
    excess = jnp.maximum(count(scores > 0, axis=-1) - moe.top_k, 0)
    return Choice(expert, wanted, excess, jnp.min(jnp.abs(scores), axis=-1), scores)


def threshold(inputs: Inputs, moe: config.MoE) -> Choice:
    """Experts whose sigmoid score passes their running threshold, which is state: causal, and balanced by its update."""
    return _above(jax.nn.sigmoid(inputs.logits) - inputs.state["threshold"][None, None], moe)


def threshold_gates(inputs: Inputs, expert: Array, asked: Array, moe: config.MoE) -> Float[Array, "G S K"]:
    """sigmoid(l_e)."""
    return at(jax.nn.sigmoid(inputs.logits), expert) * moe.gate_scale


def relu(inputs: Inputs, moe: config.MoE) -> Choice:
    """Experts with a positive logit (Wang et al. 2024, ReMoE, eq. 7). Their number is steered by the `sparsity` loss."""
    return _above(inputs.logits, moe)


def relu_gates(inputs: Inputs, expert: Array, asked: Array, moe: config.MoE) -> Float[Array, "G S K"]:
    """relu(l_e)."""
    return at(jax.nn.relu(inputs.logits), expert) * moe.gate_scale


# ---- the running threshold ----------------------------------------------------------------------------------------

MOMENTUM = 0.9
"""Of the running quantile, a step."""


def _start(moe: config.MoE) -> State:
    return {"threshold": jnp.full(columns(moe), 0.5, jnp.float32)}


def _threshold_sums(inputs: Inputs, moe: config.MoE) -> dict[str, Array]:
    """For every expert, tokens whose score lies below each of a ladder of thresholds around the present one."""
    score = jax.lax.stop_gradient(jax.nn.sigmoid(inputs.logits)) - inputs.state["threshold"][None, None]
    return {"score_below": quantile.below(score, inputs.valid, quantile.SIGMOID)}


def _update(state: State, sums: dict[str, Array], moe: config.MoE) -> State:
    """Towards the quantile of the batch that mean_k / X of the tokens pass."""
    share = 1 - mean_k(moe) / columns(moe)
    step = quantile.at(sums["score_below"], sums["tokens"], share, quantile.SIGMOID)
    return {"threshold": state["threshold"] + (1 - MOMENTUM) * step}


def _check_dynamic(moe: config.MoE) -> None:
    if not 0 < mean_k(moe) <= moe.top_k:
        raise ConfigError(f"model.moe.mean_k={moe.mean_k}: above 0 and at most top_k={moe.top_k}")


def _check_relu(moe: config.MoE) -> None:
    _check_dynamic(moe)
    if moe.sparsity <= 0:
        raise ConfigError(
            f"model.moe.sparsity={moe.sparsity} with router=relu: nothing would steer the number of experts a token takes; set "
            f"model.moe.sparsity=1e-8"
        )


def _check_top_p(moe: config.MoE) -> None:
    if not 0 < moe.top_p < 1:
        raise ConfigError(f"model.moe.top_p={moe.top_p}: a probability between 0 and 1; set 0.5")


def _of_relu(inputs: Inputs, moe: config.MoE) -> Array:
    return jax.nn.relu(inputs.logits)


def _of_sigmoid(inputs: Inputs, moe: config.MoE) -> Array:
    return jax.nn.sigmoid(inputs.logits)


PLACES = frozenset({"order", "reroute", "zero_experts", "zero_share"})
TOP_P = Router(
    token_choice(top_p, of_softmax),
    by_token(switch_gates),
    causal=True,
    reads=PLACES | {"top_p"},
    check=_check_top_p,
    distribution=of_softmax,
)
THRESHOLD = Router(
    token_choice(threshold, _of_sigmoid),
    by_token(threshold_gates),
    causal=True,
    reads=PLACES | {"mean_k"},
    check=_check_dynamic,
    distribution=lambda inputs, moe: shares(_of_sigmoid(inputs, moe)),
    keeper=Keeper(_start, _threshold_sums, _update),
)
RELU = Router(
    token_choice(relu, _of_relu),
    by_token(relu_gates),
    causal=True,
    reads=(PLACES - {"reroute"}) | {"mean_k", "sparsity"},
    check=_check_relu,
    distribution=lambda inputs, moe: shares(_of_relu(inputs, moe)),
)
