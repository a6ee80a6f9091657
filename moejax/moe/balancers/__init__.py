"""Balancers: what keeps the load even and the scores sane. All that are turned on work together.

Losses are functions of the sums of a layer over the global batch; biases and adaptive weights are state, moved once a step
from the same sums.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from moejax import config
from moejax.arrays import Stats
from moejax.errors import ConfigError
from moejax.moe.balancers.api import Balancer, Seen, share, targets
from moejax.moe.balancers.bias import QUANTILE_BIAS, SELECTION_BIAS, SIGN_BIAS, SINKHORN
from moejax.moe.balancers.load_balance import IMPORTANCE, LOAD_BALANCE, SMOOTH_LOAD, over_microbatch
from moejax.moe.balancers.regular import ORTHOGONALITY, ROUTER_Z, SCORE_VARIANCE, SPARSITY, cosine_sums
from moejax.moe.records import State

__all__ = ["BALANCERS", "Balancer", "Seen", "cosine_sums", "over_microbatch", "share", "targets"]

BALANCERS: dict[str, Balancer] = {
    "load_balance": LOAD_BALANCE,
    "router_z": ROUTER_Z,
    "importance": IMPORTANCE,
    "smooth_load": SMOOTH_LOAD,
    "score_variance": SCORE_VARIANCE,
    "orthogonality": ORTHOGONALITY,
    "sparsity": SPARSITY,
    "sign_bias": SIGN_BIAS,
    "quantile_bias": QUANTILE_BIAS,
    "sinkhorn": SINKHORN,
}
"""By the name of the option that turns each on."""

HELD: dict[str, Balancer] = {"selection_bias": SELECTION_BIAS}
"""What selection reads like a balancer and nothing moves: a published model's balance as it was found."""

ALWAYS = ("load_balance", "router_z")
"""Losses whose sums every step has: reported also when off."""


def active(moe: config.MoE) -> dict[str, Balancer]:
    """Those whose option is not 0."""
    return {name: balancer for name, balancer in (HELD | BALANCERS).items() if getattr(moe, name)}


def init(moe: config.MoE) -> State:
    """The state of one layer."""
    return {name: value for b in active(moe).values() for name, value in b.init(moe).items()}


def bias(state: State, moe: config.MoE) -> Float[Array, " X"] | None:
    """The sum of the selection biases, None where there is none."""
    parts = [state[b.bias] for b in active(moe).values() if b.bias is not None]
    return sum(parts[1:], parts[0]) if parts else None


def select(
    scores: Float[Array, "G S X"], valid: Bool[Array, "G S"], state: State, moe: config.MoE
) -> Float[Array, "G S X"]:
    """Selection scores with every bias added and every mix applied."""
    shift = bias(state, moe)
    scores = scores if shift is None else scores + shift[None, None]
    for balancer in active(moe).values():
        scores = scores if balancer.mix is None else balancer.mix(scores, valid, moe)
    return scores


def sums(seen: Seen, moe: config.MoE) -> Stats:
    """What the active ones read beside the statistics."""
    return {name: value for b in active(moe).values() for name, value in b.sums(seen, moe).items()}


def losses(stats: Stats, state: State, moe: config.MoE) -> dict[str, tuple[Array, Array]]:
    """Of every layer [L]: (loss, coefficient times adaptive weight), by balancer. Those always reported may have coefficient 0."""
    found = {}
    for name, balancer in BALANCERS.items():
        if balancer.loss is None or not (getattr(moe, name) or name in ALWAYS):
            continue
        loss = jax.vmap(lambda s, loss=balancer.loss: loss(s, moe))(stats)
        weight = state.get(balancer.weight, jnp.ones_like(loss)) if balancer.weight else jnp.ones_like(loss)
        found[name] = loss, getattr(moe, name) * weight
    return found


def update(state: State, stats: Stats, moe: config.MoE) -> State:
    """The state of one layer after a step with these sums."""
    return {name: value for b in active(moe).values() for name, value in b.update(state, stats, moe).items()}


def check(moe: config.MoE) -> None:
    """Options are finite and not negative, and each one's own rules hold."""
    for name, balancer in BALANCERS.items():
        value = getattr(moe, name)
        if not 0 <= value < math.inf:
            raise ConfigError(
                f"model.moe.{name}={value}: a negative or infinite value unbalances; set 0 to turn it off"
            )
        balancer.check(moe)
    zero, part = len(moe.zero_experts), moe.zero_share
    if part is not None and (not 0 < part < 1 or not zero):
        raise ConfigError(
            f"model.moe.zero_share={part} with {zero} zero-computation experts: a share between 0 and 1 of at least one; set null "
            f"or model.moe.zero_experts"
        )
