"""Rows summed by where they belong, as a gather: no scatter-add, so nothing depends on the order of arrival."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moejax import collectives
from moejax.arrays import no_gradient

F32 = jnp.float32


def gather_sum(
    rows: Float[Array, "R D"], index: Int[Array, "N K"], weights: Float[Array, "N K"] | None = None
) -> Float[Array, "N D"]:
    """f32 sum over k of weights[n, k] * rows[index[n, k]].

    An index past the end adds nothing, whatever its weight. No row may be named twice: each row's gradient is one gather too."""
    return _gather_sum(*collectives.vary_together(rows, index, weights))


@jax.custom_vjp
def _gather_sum(rows: Array, index: Array, weights: Array | None) -> Array:
    return _sum(rows, index, weights)


def _sum(rows: Array, index: Array, weights: Array | None) -> Array:
    """A gather for every choice: these fuse into one pass with the sum. One gather of all choices is written out before it is summed."""
    factors = None if weights is None else _live(index, rows, weights)
    choices = range(index.shape[1])
    parts = [
        _taken(rows, index[:, k]) if factors is None else _taken(rows, index[:, k]) * factors[:, k, None]
        for k in choices
    ]
    return sum(parts[1:], parts[0])


def _taken(rows: Array, index: Array) -> Array:
    """The named rows in fp32, zeros for those past the end."""
    return rows.at[index].get(mode="fill", fill_value=0).astype(F32)


def _live(index: Array, rows: Array, weights: Array) -> Array:
    """Weights, zero where no row is named: one of them may be NaN, and zero times NaN is none."""
    return jnp.where(index < rows.shape[0], weights, 0)


def _forward(rows: Array, index: Array, weights: Array | None):
    return _sum(rows, index, weights), (rows, index, weights)


def _backward(kept: tuple, dy: Array):
    rows, index, weights = kept
    count, (_, choices) = rows.shape[0], index.shape
    flat = index.reshape(-1)
    place = jnp.full_like(flat, flat.shape[0], shape=(count,))
    place = place.at[flat].set(jnp.arange(flat.shape[0], dtype=jnp.int32), mode="drop")
    d_rows = dy.at[place // choices].get(mode="fill", fill_value=0)
    if weights is None:
        return d_rows.astype(rows.dtype), no_gradient(index), None
    factor = weights.reshape(-1).at[place].get(mode="fill", fill_value=0)
    d_weights = jnp.stack([jnp.sum(_taken(rows, index[:, k]) * dy, axis=1) for k in range(choices)], axis=1)
    return (d_rows * factor[:, None]).astype(rows.dtype), no_gradient(index), d_weights.astype(weights.dtype)


_gather_sum.defvjp(_forward, _backward)
