"""Portable XLA: one loop over blocks of rows, each against its own group's weight. What a CPU uses.

FLOPs are the ideal plus half a block per group; nothing is expanded and no group is visited without rows.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array

from moejax.kernels import quantized
from moejax.kernels.grouped_matmul import blocks
from moejax.kernels.grouped_matmul.backend import Backend, Groups, added
from moejax.kernels.grouped_matmul.blocks import add_to, overhang, put_rows, rows_at, zeros
from moejax.kernels.quantized import Quantized

F32 = jnp.float32


def weight_of(w: Array | Quantized, group: Array, dtype: jnp.dtype) -> Array:
    """One group's weight [K, N]."""
    return quantized.whole(Quantized(w.values[group], w.scale[group]) if isinstance(w, Quantized) else w[group], dtype)


def times(x: Array, w: Array, transpose_w: bool) -> Array:
    """x @ w, or x @ w^T, in fp32."""
    return jax.lax.dot_general(x, w, (((1,), (1 if transpose_w else 0,)), ((), ())), preferred_element_type=F32)


def _matmul(xs: tuple, ws: tuple, groups: Groups, transpose_w: bool, bias: Array | None, out_dtype: jnp.dtype) -> Array:
    rows = xs[0].shape[0]
    work = blocks.cut(groups, rows)
    padded = [overhang(x, work.size) for x in xs]

    def turn(t: Array, y: Array) -> Array:
        group, row, _ = work.locate(t)
        parts = [
            times(rows_at(x, row, work.size), weight_of(w, group, x.dtype), transpose_w)
            for x, w in zip(padded, ws, strict=True)
        ]
        out = sum(parts[1:], parts[0])
        return put_rows(y, out if bias is None else out + bias[group][None].astype(F32), row)

    columns = ws[0].shape[1 if transpose_w else 2]
    y = jax.lax.fori_loop(0, work.total, turn, zeros(xs[0], rows + work.size, columns, dtype=out_dtype))
    return y[:rows]


def _weight_gradient(x: Array, dy: Array, groups: Groups, out_dtype: jnp.dtype, into: Array | None = None) -> Array:
    work = blocks.cut(groups, x.shape[0])
    x, dy = overhang(x, work.size), overhang(dy, work.size)

    def turn(t: Array, dw: Array) -> Array:
        group, row, mine = work.locate(t)
        rows = jnp.where(mine, rows_at(x, row, work.size), 0)
        cotangents = jnp.where(mine, rows_at(dy, row, work.size), 0)
        return add_to(dw, jnp.dot(rows.T, cotangents, preferred_element_type=F32), group)

    empty = zeros(x, groups.sizes.shape[0], x.shape[1], dy.shape[1], dtype=F32)
    return added(jax.lax.fori_loop(0, work.total, turn, empty), into, out_dtype)


BACKEND = Backend(_matmul, _weight_gradient)
