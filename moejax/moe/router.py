"""Routers: logits -> which experts each token asks for, and with what gate.

Each kind is a pure function of fp32 logits; ROUTERS is the table. Selection is on logits in fp32, ties go to the
lower expert id. A gate that could not move with its logit is refused by `check`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moejax import config
from moejax.errors import ConfigError
from moejax.moe.names import ASSIGNMENT, keep


class Choice(NamedTuple):
    """What every token asks for, before any capacity."""

    expert: Int[Array, "G S K"]
    gate: Float[Array, "G S K"]
    wanted: Bool[Array, "G S K"]
    """Requests that are made; what is not wanted counts nowhere."""


@dataclasses.dataclass(frozen=True)
class Router:
    """One kind of router."""

    choose: Callable[[Float[Array, "G S E"], Float[Array, "G S"] | None, config.MoE], Choice]
    """(logits, uniform noise in training or None, options) -> Choice"""
    check: Callable[[config.MoE], None]
    causal: bool
    """No choice depends on a later token of the same row."""
    random: bool = False
    """Wants one uniform number per token in training."""


def logits(x: Float[Array, "*N D"], weight: Float[Array, "D E"]) -> Float[Array, "*N E"]:
    """x @ weight in fp32 at the highest precision, whatever the compute type."""
    return jnp.einsum("...d,de->...e", x.astype(jnp.float32), weight, precision=jax.lax.Precision.HIGHEST)


def jittered(x: Float[Array, "B T D"], uniform: Float[Array, "B T D"], width: float) -> Float[Array, "B T D"]:
    """x times a factor uniform in [1 - width, 1 + width] (Fedus et al. 2021, section 2.4)."""
    return x.astype(jnp.float32) * (1 - width + 2 * width * uniform)


def top(scores: Float[Array, "G S E"], k: int) -> Int[Array, "G S K"]:
    """Ids of the k largest scores, largest first, saved across rematerialisation so that it is decided once."""
    return keep(jax.lax.top_k(jax.lax.stop_gradient(scores), k)[1], ASSIGNMENT)


def at(scores: Float[Array, "G S E"], expert: Int[Array, "G S K"]) -> Float[Array, "G S K"]:
    """The scores of the chosen experts."""
    return jnp.take_along_axis(scores, expert, axis=-1)


def softmax_topk(scores: Array, uniform: Array | None, moe: config.MoE) -> Choice:
    """Softmax over all experts, the k largest, gates divided by their sum if `renormalize` (Shazeer et al. 2017 without
    noise; Mixtral, Qwen3-MoE renormalise, OLMoE does not)."""
    expert = top(scores, moe.top_k)
    gate = at(jax.nn.softmax(scores), expert)
    if moe.renormalize:
        gate = gate / jnp.sum(gate, axis=-1, keepdims=True)
    return Choice(expert, gate * moe.gate_scale, jnp.ones(expert.shape, bool))


def switch(scores: Array, uniform: Array | None, moe: config.MoE) -> Choice:
    """One expert, its softmax probability as the gate (Fedus et al. 2021, eq. 2). Input jitter is `moe.jitter`."""
    expert = top(scores, 1)
    return Choice(expert, at(jax.nn.softmax(scores), expert) * moe.gate_scale, jnp.ones(expert.shape, bool))


def gshard(scores: Array, uniform: Array | None, moe: config.MoE) -> Choice:
    """Two experts, gates divided by their sum; in training the second is asked for with probability min(1, 2 g2)
    (Lepikhin et al. 2020, algorithm 1), at evaluation always."""
    expert = top(scores, 2)
    gate = at(jax.nn.softmax(scores), expert)
    gate = gate / jnp.sum(gate, axis=-1, keepdims=True)
    wanted = jnp.ones(expert.shape, bool)
    if uniform is not None:
        wanted = wanted.at[..., 1].set(keep(2 * jax.lax.stop_gradient(gate[..., 1]) > uniform, ASSIGNMENT))
    return Choice(expert, gate * moe.gate_scale, wanted)


def _check_softmax_topk(moe: config.MoE) -> None:
    if moe.top_k == 1 and moe.renormalize:
        raise ConfigError(
            "model.moe.top_k=1 with renormalize=True: the gate is always 1 and the router gets no gradient from the "
            "task; set model.moe.renormalize=False or model.moe.router=switch"
        )


def _exactly(k: int) -> Callable[[config.MoE], None]:
    def check(moe: config.MoE) -> None:
        if moe.top_k != k:
            raise ConfigError(f"model.moe.router={moe.router} chooses {k}; set model.moe.top_k={k} (it is {moe.top_k})")

    return check


ROUTERS: dict[str, Router] = {
    "softmax_topk": Router(softmax_topk, _check_softmax_topk, causal=True),
    "switch": Router(switch, _exactly(1), causal=True),
    "gshard": Router(gshard, _exactly(2), causal=True, random=True),
}


def check(moe: config.MoE) -> None:
    """The rules of routing; those of a kind are its own."""
    if moe.router not in ROUTERS:
        raise ConfigError(f"model.moe.router={moe.router!r} is not a router; choose one of {', '.join(ROUTERS)}")
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
    if not ROUTERS[moe.router].causal and not moe.allow_noncausal:
        raise ConfigError(
            f"model.moe.router={moe.router} lets future tokens change past ones, which an autoregressive model must "
            f"not; choose a causal router or set model.moe.allow_noncausal=True"
        )
    ROUTERS[moe.router].check(moe)
