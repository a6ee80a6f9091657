"""Routers: what a token (or an expert) asks for. Each is a few pure functions; ROUTERS is the table.

Selection is on fp32 scores and never differentiated; ties go to the lower expert id. A gate that could not move with its
logit is refused by `check`, and so is an option that the router does not read.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moejax import config
from moejax.errors import ConfigError
from moejax.moe.routers.api import Router
from moejax.moe.routers.dynamic import RELU, THRESHOLD, TOP_P
from moejax.moe.routers.expert_choice import EXPERT_CHOICE
from moejax.moe.routers.fixed import HASH, RANDOM
from moejax.moe.routers.soft import SOFT
from moejax.moe.routers.top_k import DENSE, GSHARD, NOISY, SWITCH, TOPK
from moejax.moe.scores import SCORES

ROUTERS: dict[str, Router] = {
    "topk": TOPK,
    "switch": SWITCH,
    "gshard": GSHARD,
    "noisy_topk": NOISY,
    "top_p": TOP_P,
    "threshold": THRESHOLD,
    "relu": RELU,
    "hash": HASH,
    "random": RANDOM,
    "dense": DENSE,
    "expert_choice": EXPERT_CHOICE,
    "soft": SOFT,
}

ROUTER_OPTIONS = (
    "score", "renormalize", "router_dropout", "router_groups", "router_groups_kept", "router_groups_best", "top_k_start",
    "top_k_steps", "top_p", "mean_k", "hash_by", "soft_slots", "order", "reroute", "zero_experts", "zero_share", "selection_bias",
    "sign_bias", "quantile_bias", "sinkhorn", "smooth_load", "sparsity",
)  # fmt: skip
"""Options that only some routers read."""


def logits(
    x: Float[Array, "*N D"], weight: Float[Array, "D X"], bias: Float[Array, " X"] | None = None
) -> Float[Array, "*N X"]:
    """x @ weight + bias in fp32 at the highest precision, whatever the compute type."""
    found = jnp.einsum("...d,de->...e", x.astype(jnp.float32), weight, precision=jax.lax.Precision.HIGHEST)
    return found if bias is None else found + jnp.broadcast_to(bias, found.shape)


def jittered(x: Float[Array, "B T D"], uniform: Float[Array, "B T D"], width: float) -> Float[Array, "B T D"]:
    """x times a factor uniform in [1 - width, 1 + width] (Fedus et al. 2021, section 2.4)."""
    return x.astype(jnp.float32) * (1 - width + 2 * width * uniform)


def check(moe: config.MoE) -> None:
    """The rules of routing; those of a kind are its own."""
    if moe.router not in ROUTERS:
        raise ConfigError(f"model.moe.router={moe.router!r} is not a router; choose one of {', '.join(ROUTERS)}")
    if moe.score not in SCORES:
        raise ConfigError(f"model.moe.score={moe.score!r} is not a score; choose one of {', '.join(SCORES)}")
    if not 1 <= moe.top_k <= moe.num_experts:
        raise ConfigError(
            f"model.moe.top_k={moe.top_k} of model.moe.num_experts={moe.num_experts}: a token chooses between 1 and "
            f"{moe.num_experts} distinct experts; lower top_k or raise num_experts"
        )
    if not 0 < moe.gate_scale < math.inf:
        raise ConfigError(
            f"model.moe.gate_scale={moe.gate_scale}: a finite factor above 0, or the router gets no gradient from the task; "
            f"set 1.0"
        )
    if not 0 <= moe.jitter < 1:
        raise ConfigError(f"model.moe.jitter={moe.jitter}: a half width in [0, 1); Switch uses 0.01")
    kind = ROUTERS[moe.router]
    _check_read(moe, kind)
    if moe.router_bias and "logits" not in kind.heads(moe):
        raise ConfigError(
            f"model.moe.router_bias=True with model.moe.router={moe.router}, which has no logits; set it to False"
        )
    if not (kind.causal or moe.allow_noncausal):
        raise ConfigError(
            f"model.moe.router={moe.router} lets future tokens change past ones, which an autoregressive model must "
            f"not; choose a causal router or set model.moe.allow_noncausal=True"
        )
    kind.check(moe)


def _check_read(moe: config.MoE, kind: Router) -> None:
    """No option is set that would do nothing."""
    for field in dataclasses.fields(moe):
        value = getattr(moe, field.name)
        if field.name in ROUTER_OPTIONS and field.name not in kind.reads and value != field.default:
            readers = [name for name, other in ROUTERS.items() if field.name in other.reads]
            raise ConfigError(
                f"model.moe.{field.name}={value!r} does nothing with model.moe.router={moe.router}; leave it at "
                f"{field.default!r} or choose one of {', '.join(readers)}"
            )
