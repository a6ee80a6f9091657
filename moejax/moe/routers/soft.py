"""Soft mixture (Puigcerver et al. 2023): slots are weighted means of tokens, outputs weighted means of slots. For encoders."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moejax import config
from moejax.arrays import NOWHERE, SoftAssignment
from moejax.errors import ConfigError
from moejax.moe.records import Inputs, Routed, nothing
from moejax.moe.routers.api import Router


def assign(inputs: Inputs, limit: Int[Array, " G"], slots: int, moe: config.MoE) -> Routed:
    """Every slot of every expert is a request, met in each group that has a token. It has no token of its own: 0."""
    groups, width = inputs.valid.shape[0], moe.num_experts * moe.soft_slots
    place = jnp.arange(width, dtype=jnp.int32)
    asked = jnp.broadcast_to(jnp.any(inputs.valid, axis=1)[:, None], (groups, width))
    expert = jnp.broadcast_to((place // moe.soft_slots)[None], (groups, width))
    slot = jnp.where(asked, (place % moe.soft_slots)[None], NOWHERE)
    return Routed(jnp.zeros_like(expert), expert, expert, asked, slot, *nothing(inputs.valid), None)


def weigh(inputs: Inputs, routed: Routed, moe: config.MoE) -> SoftAssignment:
    """dispatch: softmax over the valid tokens of the group; combine: softmax over all slots (eq. 1 and 3)."""
    shape = (*inputs.valid.shape, moe.num_experts, moe.soft_slots)
    valid = inputs.valid[..., None]
    some = jnp.any(valid, axis=1, keepdims=True)
    over_tokens = jax.nn.softmax(jnp.where(valid | ~some, inputs.logits, -jnp.inf), axis=1)
    dispatch = jnp.where(valid, over_tokens, 0)
    combine = jnp.where(valid, jax.nn.softmax(inputs.logits, axis=-1), 0) * moe.gate_scale
    return SoftAssignment(dispatch.reshape(shape), combine.reshape(shape))


def distribution(inputs: Inputs, moe: config.MoE) -> Float[Array, "G S E"]:
    """A token's combine weights summed by expert."""
    shape = (*inputs.valid.shape, moe.num_experts, moe.soft_slots)
    return jnp.sum(jax.nn.softmax(inputs.logits).reshape(shape), axis=-1)


def _check(moe: config.MoE) -> None:
    if moe.soft_slots < 1:
        raise ConfigError(f"model.moe.soft_slots={moe.soft_slots}: at least 1")
    if moe.capacity_factor is not None:
        raise ConfigError(
            f"model.moe.capacity_factor={moe.capacity_factor} with router=soft, whose slots are model.moe.soft_slots; set null"
        )


SOFT = Router(
    assign,
    weigh,
    causal=False,
    reads=frozenset({"soft_slots"}),
    check=_check,
    heads=lambda moe: {"logits": moe.num_experts * moe.soft_slots},
    distribution=distribution,
    token_choice=False,
    soft=True,
)
