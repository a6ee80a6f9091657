"""Portable XLA: a loop over groups, and in it over blocks of rows, each against its own group's weight. What a CPU uses.

FLOPs are the ideal plus half a small block per group; nothing is expanded and no group is visited without rows.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array

from moejax.kernels import quantized
from moejax.kernels.grouped_matmul import blocks
from moejax.kernels.grouped_matmul.backend import Backend, Groups, added
from moejax.kernels.grouped_matmul.blocks import Block, overhang, put_group, put_rows, rows_at, unwritten, zeros
from moejax.kernels.quantized import Quantized

F32 = jnp.float32
PANEL = 16
"""Rows that are turned at once: numbers of one column are then a line of the cache."""


def weight_of(w: Array | Quantized, group: Array, dtype: jnp.dtype) -> Array:
    """One group's weight [K, N], once for all of its blocks: the barrier keeps the slice out of the inner loop."""
    own = quantized.whole(Quantized(w.values[group], w.scale[group]) if isinstance(w, Quantized) else w[group], dtype)
    return jax.lax.optimization_barrier(own)


def times(x: Array, w: Array, transpose_w: bool) -> Array:
    """x @ w, or x @ w^T, in fp32."""
    return jax.lax.dot_general(x, w, (((1,), (1 if transpose_w else 0,)), ((), ())), preferred_element_type=F32)


def turned(x: Array) -> Array:
    """x^T, in memory. Panels of PANEL rows are turned first and then put side by side: column by column over all rows, a width that is a
    power of two has every step fall into the same few lines of the cache. The barriers keep the turning out of the matmul, which is slower
    where it contracts leading dimensions."""
    rows, width = x.shape
    panel = math.gcd(rows, PANEL)
    panels = jax.lax.optimization_barrier(x.reshape(rows // panel, panel, width).swapaxes(1, 2))
    return jax.lax.optimization_barrier(panels.swapaxes(0, 1).reshape(width, rows))


def product_over_rows(x_turned: Array, dy: Array) -> Array:
    """x^T @ dy in fp32, of `turned(x)`."""
    return jnp.dot(x_turned, dy, preferred_element_type=F32)


def _matmul(xs: tuple, ws: tuple, groups: Groups, transpose_w: bool, bias: Array | None, out_dtype: jnp.dtype) -> Array:
    rows = xs[0].shape[0]
    work = blocks.cut(groups, rows)
    padded = [overhang(x, work.over) for x in xs]

    def visit(group: Array, y: Array) -> Array:
        own = [weight_of(w, group, x.dtype) for x, w in zip(xs, ws, strict=True)]

        def turn(block: Block, y: Array) -> Array:
            parts = [times(rows_at(x, block), w, transpose_w) for x, w in zip(padded, own, strict=True)]
            out = sum(parts[1:], parts[0])
            return put_rows(y, out if bias is None else out + bias[group][None].astype(F32), block)

        return work.each_block(group, turn, y)

    columns = ws[0].shape[1 if transpose_w else 2]
    return work.each_group(visit, unwritten(xs[0], rows + work.over, columns, dtype=out_dtype))[:rows]


def _weight_gradient(x: Array, dy: Array, groups: Groups, out_dtype: jnp.dtype, into: Array | None = None) -> Array:
    work = blocks.cut(groups, x.shape[0])
    x, dy = overhang(x, work.over), overhang(dy, work.over)

    def visit(group: Array, dw: Array) -> Array:
        def turn(block: Block, own: Array) -> Array:
            rows, cotangents = (jnp.where(block.mine, rows_at(a, block), 0) for a in (x, dy))
            return own + product_over_rows(turned(rows), cotangents)

        return put_group(dw, work.each_block(group, turn, zeros(x, x.shape[1], dy.shape[1], dtype=F32)), group)

    empty = zeros(x, groups.sizes.shape[0], x.shape[1], dy.shape[1], dtype=F32)
    return added(work.each_group(visit, empty), into, out_dtype)


BACKEND = Backend(_matmul, _weight_gradient)
