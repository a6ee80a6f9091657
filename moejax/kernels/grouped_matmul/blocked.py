"""Portable XLA: one loop over blocks of rows, each against its own group's weight. What a CPU uses.

FLOPs are the ideal plus half a block per group; nothing is expanded and no group is visited without rows.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moejax.kernels.grouped_matmul import blocks
from moejax.kernels.grouped_matmul.blocks import add_to, overhang, put_rows, rows_at, zeros

F32 = jnp.float32


@jax.custom_vjp
def grouped_matmul(
    x: Float[Array, "M K"], w: Float[Array, "G K N"], group_sizes: Int[Array, " G"]
) -> Float[Array, "M N"]:
    """See `api.grouped_matmul`."""
    return _times(x, w, group_sizes)


def _times(x: Array, w: Array, group_sizes: Array) -> Array:
    work = blocks.cut(group_sizes, x.shape[0])
    padded = overhang(x, work.size)

    def turn(t: Array, y: Array) -> Array:
        group, row, _ = work.locate(t)
        return put_rows(y, jnp.dot(rows_at(padded, row, work.size), w[group], preferred_element_type=F32), row)

    y = jax.lax.fori_loop(0, work.total, turn, zeros(x, x.shape[0] + work.size, w.shape[2]))
    return y[: x.shape[0]]


def _weight_gradient(x: Array, dy: Array, w: Array, group_sizes: Array) -> Array:
    work = blocks.cut(group_sizes, x.shape[0])
    x, dy = overhang(x, work.size), overhang(dy, work.size)

    def turn(t: Array, dw: Array) -> Array:
        group, row, mine = work.locate(t)
        rows = jnp.where(mine, rows_at(x, row, work.size), 0)
        cotangents = jnp.where(mine, rows_at(dy, row, work.size), 0)
        return add_to(dw, jnp.dot(rows.T, cotangents, preferred_element_type=F32), group)

    return jax.lax.fori_loop(0, work.total, turn, zeros(x, *w.shape, dtype=F32)).astype(w.dtype)


def _forward(x: Array, w: Array, group_sizes: Array):
    return _times(x, w, group_sizes), (x, w, group_sizes)


def _backward(residuals, dy: Array):
    x, w, group_sizes = residuals
    dx = _times(dy, w.swapaxes(1, 2), group_sizes)
    inside = jnp.arange(x.shape[0])[:, None] < jnp.sum(group_sizes)
    return jnp.where(inside, dx, 0), _weight_gradient(x, dy, w, group_sizes), None


grouped_matmul.defvjp(_forward, _backward)
