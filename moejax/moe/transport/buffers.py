"""Capacity buffers [E, G, C, D]: their exchange over the expert axes, and the experts on them. c slots are a piece of C."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from moejax import collectives
from moejax.kernels.activations import Activation, activated
from moejax.kernels.grouped_mlp import Weights
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
    route: object, buffers: Float[Array, "L GG c D"], weights: tuple[Weights, ...], impl: str, activation: Activation
) -> Float[Array, "L GG c D"]:
    """Every expert on its slots, one class of widths after another."""
    parts = jnp.split(buffers, len(weights), axis=0)
    return jnp.concatenate([_class(part, w, activation) for part, w in zip(parts, weights, strict=True)], axis=0)


def _class(buffers: Array, weights: Weights, activation: Activation) -> Array:
    """The groups are equal, so a batched matmul is the grouped one."""
    x = buffers.reshape(buffers.shape[0], -1, buffers.shape[-1])

    def times(rows: Array, w: Array | None, bias: Array | None) -> Array | None:
        if w is None:
            return None
        y = jnp.einsum("lnk,lkm->lnm", rows, w, preferred_element_type=jnp.float32)
        return (y if bias is None else y + bias[:, None].astype(jnp.float32)).astype(x.dtype)

    h = times(x, weights.gate, weights.gate_bias), times(x, weights.up, weights.up_bias)
    return times(activated(*h, activation), weights.down, weights.down_bias).reshape(buffers.shape)  # pyright: ignore[reportOptionalMemberAccess]
