"""Portable XLA, fused: gather, gate and up, activation and down in one loop over blocks of rows; likewise backward.

The backward keeps x in token order and the pre-activation h; gathered rows and activations are made again.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from moejax.kernels.grouped_matmul import blocks
from moejax.kernels.grouped_matmul.blocks import add_to, overhang, put_rows, rows_at, zeros
from moejax.kernels.grouped_mlp.weights import Weights, flat, pair, swiglu, swiglu_gradient

F32 = jnp.float32


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def grouped_mlp(
    x: Float[Array, "M D"],
    row_index: Int[Array, " R"],
    group_sizes: Int[Array, " E"],
    weights: Weights,
    clamp: float | None,
) -> Float[Array, "R D"]:
    """See `api.grouped_mlp`."""
    return _forward(x, row_index, group_sizes, weights, clamp)[0]


def _forward(x: Array, row_index: Array, group_sizes: Array, weights: Weights, clamp: float | None):
    rows = row_index.shape[0]
    work = blocks.cut(group_sizes, rows)
    size = work.size
    index, gate_up = overhang(row_index, size), flat(weights.gate_up)

    def turn(t: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        y, h = carry
        group, row, _ = work.locate(t)
        x_block = x[rows_at(index, row, size)]
        h_block = jnp.dot(x_block, gate_up[group], preferred_element_type=F32).astype(x.dtype)
        y_block = jnp.dot(swiglu(pair(h_block), clamp), weights.down[group], preferred_element_type=F32)
        return put_rows(y, y_block, row), put_rows(h, h_block, row)

    start = zeros(x, rows + size, x.shape[1]), zeros(x, rows + size, gate_up.shape[2])
    y, h = jax.lax.fori_loop(0, work.total, turn, start)
    return y[:rows], (x, row_index, group_sizes, weights, h)


def _backward(clamp: float | None, residuals, dy: Array):
    x, row_index, group_sizes, weights, h = residuals
    rows = row_index.shape[0]
    work = blocks.cut(group_sizes, rows)
    size = work.size
    index, gate_up, dy = overhang(row_index, size), flat(weights.gate_up), overhang(dy, size)

    def turn(t: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        dx_rows, d_gate_up, d_down = carry
        group, row, mine = work.locate(t)
        x_block = jnp.where(mine, x[rows_at(index, row, size)], 0)
        dy_block = jnp.where(mine, rows_at(dy, row, size), 0)
        h_block = jnp.where(mine, rows_at(h, row, size), 0)
        da_block = jnp.dot(dy_block, weights.down[group].T, preferred_element_type=F32).astype(x.dtype)
        a_block: Array = swiglu(pair(h_block), clamp)  # pyright: ignore[reportAssignmentType]
        dh_block = swiglu_gradient(pair(h_block), da_block, clamp).reshape(h_block.shape)
        dx_block = jnp.dot(dh_block, gate_up[group].T, preferred_element_type=F32)
        d_gate_up = add_to(d_gate_up, jnp.dot(x_block.T, dh_block, preferred_element_type=F32), group)
        d_down = add_to(d_down, jnp.dot(a_block.T, dy_block, preferred_element_type=F32), group)
        return put_rows(dx_rows, dx_block, row), d_gate_up, d_down

    start = zeros(x, rows + size, x.shape[1]), *(zeros(x, *w.shape, dtype=F32) for w in (gate_up, weights.down))
    dx_rows, d_gate_up, d_down = jax.lax.fori_loop(0, work.total, turn, start)
    live = jnp.arange(rows)[:, None] < jnp.sum(group_sizes)
    dx = jnp.zeros_like(x).at[row_index].add(jnp.where(live, dx_rows[:rows], 0))
    gradients = Weights(
        d_gate_up.reshape(weights.gate_up.shape).astype(weights.gate_up.dtype), d_down.astype(weights.down.dtype)
    )
    no_gradient = np.zeros((), jax.dtypes.float0)
    return dx, np.broadcast_to(no_gradient, row_index.shape), np.broadcast_to(no_gradient, group_sizes.shape), gradients


grouped_mlp.defvjp(_forward, _backward)
