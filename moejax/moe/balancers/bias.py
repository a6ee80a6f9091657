"""Balancing without a loss: biases on selection, moved after each step, and Sinkhorn's scaling of a group's scores."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from moejax import config
from moejax.arrays import Stats
from moejax.errors import ConfigError
from moejax.moe import quantile
from moejax.moe.balancers.api import Balancer, Seen, targets
from moejax.moe.records import State, columns


def _by_sign(state: State, stats: Stats, moe: config.MoE) -> State:
    """b_e += u sign(fair load - load): up for the hungry, down for the full (Wang et al. 2024, algorithm 1). Load is what
    valid tokens asked for, before any place was short."""
    requests = stats["requests"].astype(jnp.float32)
    fair = targets(moe) * jnp.sum(requests)
    # Compared, not subtracted: a compiler may fuse the product into the difference, which is then not 0 at balance.
    direction = (fair > requests).astype(jnp.float32) - (fair < requests).astype(jnp.float32)
    return {"sign_bias": state["sign_bias"] + moe.sign_bias * direction}


def _zeros(name: str):
    return lambda moe: {name: jnp.zeros(columns(moe), jnp.float32)}


def _ladder(moe: config.MoE):
    """Rungs in the unit of the selection scores."""
    return quantile.SIGMOID if moe.score == "sigmoid" else quantile.LOGITS


def gaps(preference: Float[Array, "G S X"], k: int) -> Float[Array, "G S X"]:
    """By how much an expert's bias must rise until it passes the token's threshold, halfway between the k-th and the next
    selection score. -inf where everything that may be chosen is, inf for what is hidden."""
    best = jax.lax.top_k(preference, k + 1)[0]
    threshold = (best[..., k - 1 : k] + best[..., k:]) / 2
    return jnp.where(preference > -jnp.inf, threshold - preference, jnp.inf)


def _gap_sums(seen: Seen, moe: config.MoE) -> Stats:
    """For every expert, how many tokens would choose it if its bias rose by less than each rung."""
    assert seen.routed.preference is not None
    gap = gaps(jax.lax.stop_gradient(seen.routed.preference), moe.top_k)
    return {"gap_below": quantile.below(gap, seen.inputs.valid, _ladder(moe))}


def _by_quantile(state: State, stats: Stats, moe: config.MoE) -> State:
    """b_e moves towards the value at which its fair share of the tokens would choose it, their thresholds held fixed: with a
    rate of 1 one turn of block coordinate descent on the dual of the optimal assignment problem (balanced assignment as
    in Lewis et al. 2021, BASE). Thresholds are dual variables too, and best between the two scores; had each expert looked
    at its competitor instead, two that compete for the same tokens would trade places for ever."""
    share = jnp.minimum(targets(moe) * moe.top_k, 1)
    step = quantile.at(stats["gap_below"], stats["tokens"], share, _ladder(moe))
    return {"quantile_bias": state["quantile_bias"] + moe.quantile_bias * step}


def _check_quantile(moe: config.MoE) -> None:
    if moe.quantile_bias > 1:
        raise ConfigError(f"model.moe.quantile_bias={moe.quantile_bias}: a share of the way, at most 1; set 1.0")
    if moe.quantile_bias and (moe.router_groups > moe.router_groups_kept or moe.top_k == columns(moe)):
        raise ConfigError(
            f"model.moe.quantile_bias={moe.quantile_bias} with router_groups={moe.router_groups}, router_groups_kept="
            f"{moe.router_groups_kept}, top_k={moe.top_k} of {columns(moe)}: no bias of one expert brings it the tokens that do not "
            f"keep its group, or that take all; set router_groups_kept=router_groups, or balance by sign_bias"
        )
    if moe.quantile_bias and moe.top_k_start is not None:
        raise ConfigError(
            f"model.moe.quantile_bias={moe.quantile_bias} with top_k_start={moe.top_k_start}: the quantile is that of a fixed "
            f"number of choices; set top_k_start=null, or balance by sign_bias"
        )


def _sinkhorn(scores: Float[Array, "G S X"], valid: Bool[Array, "G S"], moe: config.MoE) -> Float[Array, "G S X"]:
    """Scores as log weights, scaled in turn so that every expert has the same total over the group's valid tokens and every
    token a total of 1 (Clark et al. 2022, section 4.1, S-BASE)."""
    some = jnp.any(valid, axis=1)[:, None, None]
    outside = jnp.where(valid[..., None] | ~some, 0, -jnp.inf)
    for _ in range(moe.sinkhorn):
        scores = scores - jax.nn.logsumexp(scores + outside, axis=1, keepdims=True)
        scores = scores - jax.nn.logsumexp(scores, axis=2, keepdims=True)
    return scores


def _check_sinkhorn(moe: config.MoE) -> None:
    if moe.sinkhorn and not moe.allow_noncausal:
        raise ConfigError(
            f"model.moe.sinkhorn={moe.sinkhorn} scales a token's scores by those of later tokens, which an autoregressive model "
            f"must not; set model.moe.sinkhorn=0 or model.moe.allow_noncausal=True"
        )
    if moe.sinkhorn and (moe.selection_bias or moe.sign_bias or moe.quantile_bias):
        raise ConfigError(
            f"model.moe.sinkhorn={moe.sinkhorn} with selection_bias={moe.selection_bias}, sign_bias={moe.sign_bias}, quantile_bias="
            f"{moe.quantile_bias}: the scaling takes every bias out again; set sinkhorn=0, or all biases to 0"
        )


SELECTION_BIAS = Balancer(init=_zeros("selection_bias"), bias="selection_bias")
SIGN_BIAS = Balancer(init=_zeros("sign_bias"), update=_by_sign, bias="sign_bias")
QUANTILE_BIAS = Balancer(
    sums=_gap_sums, init=_zeros("quantile_bias"), update=_by_quantile, bias="quantile_bias", check=_check_quantile
)
SINKHORN = Balancer(mix=_sinkhorn, check=_check_sinkhorn)
