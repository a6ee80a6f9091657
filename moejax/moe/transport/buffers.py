"""Capacity buffers [E, G, C, D]: their exchange over the expert axis, and the experts on them."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from moejax import sharding
from moejax.kernels.grouped_mlp.weights import Weights, flat, swiglu
from moejax.moe.transport.plan import Plan


def to_experts(buffers: Float[Array, "E G C D"], plan: Plan) -> Float[Array, "L GG C D"]:
    """Slots of all experts on every device -> slots of all groups of the expert axis on the owner of the expert."""
    return sharding.all_to_all(buffers, plan.axis, split=0, concat=1)


def to_groups(buffers: Float[Array, "L GG C D"], plan: Plan) -> Float[Array, "E G C D"]:
    """The inverse of `to_experts`."""
    return sharding.all_to_all(buffers, plan.axis, split=1, concat=0)


def experts(
    route: object, buffers: Float[Array, "L GG C D"], weights: tuple[Weights, ...], impl: str, clamp: float | None
) -> Float[Array, "L GG C D"]:
    """Every expert on its slots, one class of widths after another."""
    parts = jnp.split(buffers, len(weights), axis=0)
    return jnp.concatenate([_class(part, w, clamp) for part, w in zip(parts, weights, strict=True)], axis=0)


def _class(buffers: Array, weights: Weights, clamp: float | None) -> Array:
    """The groups are equal, so a batched matmul is the grouped one."""
    local, groups, slots, width = buffers.shape
    x = buffers.reshape(local, groups * slots, width)
    h = jnp.einsum("lnd,ldf->lnf", x, flat(weights.gate_up), preferred_element_type=jnp.float32).astype(x.dtype)
    y = jnp.einsum("lnf,lfd->lnd", swiglu(h, clamp), weights.down, preferred_element_type=jnp.float32).astype(x.dtype)
    return y.reshape(buffers.shape)
