"""Capacity buffers [E, G, C, D]: their exchange over the expert axes, and the experts on them. c slots are a piece of C."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from moejax import collectives
from moejax.kernels.grouped_mlp.weights import Weights, flat, pair, swiglu
from moejax.moe import pieces
from moejax.moe.names import EXCHANGED, keep
from moejax.moe.transport.plan import Plan


def to_experts(buffers: Float[Array, "E G C D"], plan: Plan, dtype: jnp.dtype) -> Float[Array, "L GG c D"]:
    """Slots of all experts on every device -> slots of all groups of the expert axes on the owner of the expert.

    Where a group is cut over devices their tokens are joined in its buffers, of which each device then has a piece."""
    full = pieces.joined(buffers, plan.cut).astype(dtype)
    return keep(collectives.all_to_all(full, plan.axis, split=0, concat=1), EXCHANGED)


def to_groups(buffers: Float[Array, "L GG c D"], plan: Plan) -> Float[Array, "E G C D"]:
    """The inverse of `to_experts`."""
    full = keep(collectives.all_to_all(buffers, plan.axis, split=1, concat=0), EXCHANGED)
    return pieces.parted(full, plan.cut, plan.capacity)


def experts(
    route: object, buffers: Float[Array, "L GG c D"], weights: tuple[Weights, ...], impl: str, clamp: float | None
) -> Float[Array, "L GG c D"]:
    """Every expert on its slots, one class of widths after another."""
    parts = jnp.split(buffers, len(weights), axis=0)
    return jnp.concatenate([_class(part, w, clamp) for part, w in zip(parts, weights, strict=True)], axis=0)


def _class(buffers: Array, weights: Weights, clamp: float | None) -> Array:
    """The groups are equal, so a batched matmul is the grouped one."""
    local, groups, slots, width = buffers.shape
    x = buffers.reshape(local, groups * slots, width)
    h = jnp.einsum("lnd,ldf->lnf", x, flat(weights.gate_up), preferred_element_type=jnp.float32).astype(x.dtype)
    y = jnp.einsum("lnf,lfd->lnd", swiglu(pair(h), clamp), weights.down, preferred_element_type=jnp.float32).astype(
        x.dtype
    )
    return y.reshape(buffers.shape)
