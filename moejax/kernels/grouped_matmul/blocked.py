"""Portable XLA: a loop over waves of blocks of rows, each block against its own group's weight. What a CPU uses.

FLOPs are the ideal and those of the few empty rows of a wave; nothing is expanded and no group is visited without rows.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array

from moejax.kernels import quantized
from moejax.kernels.grouped_matmul import blocks
from moejax.kernels.grouped_matmul.backend import Backend, Groups, added
from moejax.kernels.grouped_matmul.blocks import Wave, add_to_groups, put_rows, rows_at, unwritten, zeros
from moejax.kernels.quantized import Quantized

F32 = jnp.float32
PANEL = 16
"""Rows that are turned at once: numbers of one column are then a line of the cache."""


def weights_of(w: Array | Quantized, wave: Wave, dtype: jax.typing.DTypeLike) -> Array:
    """The weight of each block's group, [B, K, N]; or its bias, [B, N]."""
    own = jax.tree.map(lambda leaf: leaf.at[wave.group].get(mode="promise_in_bounds"), w)
    return quantized.whole(own, dtype)


def times(x: Array, w: Array, transpose_w: bool) -> Array:
    """x [B, S, K] @ w [B, K, N], or x @ w^T, in fp32."""
    return jax.lax.dot_general(x, w, (((2,), (2 if transpose_w else 1,)), ((0,), (0,))), preferred_element_type=F32)


def turned(x: Array) -> Array:
    """x^T of each block, in memory. Panels of PANEL rows are turned first and then put side by side: column by column over all rows,
    a width that is a power of two has every step fall into the same few lines of the cache. The barriers keep the turning out of the
    matmul, which is slower where it contracts rows."""
    number, rows, width = x.shape
    panel = math.gcd(rows, PANEL)
    panels = jax.lax.optimization_barrier(x.reshape(number, rows // panel, panel, width).swapaxes(2, 3))
    return jax.lax.optimization_barrier(panels.swapaxes(1, 2).reshape(number, width, rows))


def product_over_rows(x_turned: Array, dy: Array) -> Array:
    """x^T @ dy of each block in fp32, of `turned(x)`: [B, K, N]."""
    return times(x_turned, dy, False)


def masked(x: Array, wave: Wave) -> Array:
    """Zeros where a row is repeated."""
    return jnp.where(wave.mine.reshape(*wave.mine.shape, *(1,) * (x.ndim - 2)), x, 0)


def _matmul(xs: tuple, ws: tuple, groups: Groups, transpose_w: bool, bias: Array | None, out_dtype: jnp.dtype) -> Array:
    rows, columns = xs[0].shape[0], ws[0].shape[1 if transpose_w else 2]
    if not rows:
        return zeros(xs[0], 0, columns, dtype=out_dtype)
    work = blocks.cut(groups, rows)

    def visit(wave: Wave, y: Array) -> Array:
        pairs = zip(xs, ws, strict=True)
        parts = [times(rows_at(x, wave), weights_of(w, wave, x.dtype), transpose_w) for x, w in pairs]
        out = sum(parts[1:], parts[0])
        own_bias = None if bias is None else weights_of(bias, wave, bias.dtype)
        return put_rows(y, plus(out, own_bias), wave)

    return work.each(visit, unwritten(xs[0], rows + work.over, columns, dtype=out_dtype))[:rows]


def plus(rows: Array, bias: Array | None) -> Array:
    """Rows [B, S, N] and the bias of their group [B, N]."""
    return rows if bias is None else rows + bias[:, None].astype(F32)


def _weight_gradient(x: Array, dy: Array, groups: Groups, out_dtype: jnp.dtype, into: Array | None = None) -> Array:
    empty = zeros(x, groups.sizes.shape[0], x.shape[1], dy.shape[1], dtype=F32)
    if not x.shape[0]:
        return added(empty, into, out_dtype)

    def visit(wave: Wave, dw: Array) -> Array:
        product = product_over_rows(turned(rows_at(x, wave)), masked(rows_at(dy, wave), wave))
        return add_to_groups(dw, product, wave)

    return added(blocks.cut(groups, x.shape[0]).each(visit, empty), into, out_dtype)


BACKEND = Backend(_matmul, _weight_gradient)
