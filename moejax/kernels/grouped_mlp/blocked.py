"""Portable XLA, fused: gather, gate and up, activation and down in one loop over blocks of rows; likewise backward."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array

from moejax.kernels.activations import Activation
from moejax.kernels.grouped_matmul import Groups, blocks
from moejax.kernels.grouped_matmul.api import no_gradient
from moejax.kernels.grouped_matmul.blocked import times, weight_of
from moejax.kernels.grouped_matmul.blocks import add_to, overhang, put_rows, rows_at, zeros
from moejax.kernels.grouped_mlp.composed import Kept, Slopes
from moejax.kernels.grouped_mlp.weights import Weights
from moejax.kernels.quantized import Quantized

F32 = jnp.float32


def rows_needed(rows: int, groups: int) -> int:
    """Rows of what is kept for the backward pass: the last block may run over the end."""
    return rows + blocks.block_size(rows, groups)


def forward(
    x: Array,
    index: Array,
    groups: Groups,
    weights: Weights,
    row_weight: Array | None,
    activation: Activation,
    room: int | None = None,
) -> tuple[Array, Kept]:
    """y [R, D], and pre-activations [room, F] in the order of rows; `room` as `rows_needed` has it, or more."""
    rows, hidden = index.shape[0], weights.up.shape[2]
    work = blocks.cut(groups, rows)
    size, room = work.size, room or rows + work.size
    index = overhang(index, size)
    factors = None if row_weight is None else overhang(row_weight, size)

    def turn(t: Array, carry: tuple[Array, Kept]) -> tuple[Array, Kept]:
        y, kept = carry
        group, row, _ = work.locate(t)
        x_block = x[rows_at(index, row, size)]
        gate_h = _hidden(x_block, weights.gate, weights.gate_bias, group)
        up_h = _hidden(x_block, weights.up, weights.up_bias, group)
        a = activation.value(gate_h, up_h).astype(x.dtype)
        y_block = _plus(times(a, weight_of(weights.down, group, x.dtype), False), weights.down_bias, group)
        if factors is not None:
            y_block = y_block.astype(x.dtype).astype(F32) * rows_at(factors, row, size)[:, None]
        kept = Kept(None if gate_h is None else put_rows(kept.gate_h, gate_h, row), put_rows(kept.up_h, up_h, row))
        return put_rows(y, y_block, row), kept

    empty = zeros(x, room, hidden)
    start = zeros(x, rows + size, x.shape[1]), Kept(None if weights.gate is None else empty, empty)
    y, kept = jax.lax.fori_loop(0, work.total, turn, start)
    return y[:rows], kept


def backward(
    x: Array,
    index: Array,
    groups: Groups,
    weights: Weights,
    row_weight: Array | None,
    kept: Kept,
    activation: Activation,
    dy: Array,
) -> Slopes:
    """All gradients for the cotangent dy [R, D] of y."""
    rows = index.shape[0]
    work = blocks.cut(groups, rows)
    size = work.size
    index, dy = overhang(index, size), overhang(dy, size)
    factors = None if row_weight is None else overhang(row_weight, size)

    def turn(t: Array, slopes: Slopes) -> Slopes:
        group, row, mine = work.locate(t)
        x_block = jnp.where(mine, x[rows_at(index, row, size)], 0)
        dy_block = jnp.where(mine, rows_at(dy, row, size), 0)
        gate_h, up_h = (None if h is None else jnp.where(mine, rows_at(h, row, size), 0) for h in kept)
        a = activation.value(gate_h, up_h)
        da = times(dy_block, weight_of(weights.down, group, x.dtype), True)
        d_weight = slopes.row_weight
        if factors is not None:
            factor = jnp.where(mine, rows_at(factors, row, size)[:, None], 0)
            sums = jnp.sum(da * a, axis=1)
            if weights.down_bias is not None:
                sums = sums + times(dy_block, weights.down_bias[group][:, None].astype(x.dtype), False)[:, 0]
            d_weight, da, a = put_rows(d_weight, sums, row), da * factor, a * factor
            dy_bias = dy_block.astype(F32) * factor
        else:
            dy_bias = dy_block.astype(F32)
        slope_of = dict(zip(("gate", "up"), activation.gradient(gate_h, up_h, da), strict=True))
        slope_of = {name: jnp.where(mine, s, 0) for name, s in slope_of.items() if s is not None}
        cast = {name: s.astype(x.dtype) for name, s in slope_of.items()}
        d_x = sum(times(s, weight_of(getattr(weights, name), group, x.dtype), True) for name, s in cast.items())

        d = slopes.weights._asdict()
        for name, s in cast.items():
            d[name] = _add(d[name], x_block, s, group)
            d[f"{name}_bias"] = _add_sum(d[f"{name}_bias"], slope_of[name], group)
        d["down"] = _add(d["down"], a.astype(x.dtype), dy_block, group)
        d["down_bias"] = _add_sum(d["down_bias"], dy_bias, group)
        return Slopes(put_rows(slopes.rows, d_x, row), Weights(**d), d_weight)

    none = Weights(*(_no_slope(x, w) for w in weights))
    d_weight = None if row_weight is None else zeros(x, rows + size, dtype=F32)
    slopes = jax.lax.fori_loop(0, work.total, turn, Slopes(zeros(x, rows + size, x.shape[1]), none, d_weight))
    found = Weights(*(_finished(w, d) for w, d in zip(weights, slopes.weights, strict=True)))
    return Slopes(slopes.rows[:rows], found, None if d_weight is None else slopes.row_weight[:rows])


def _hidden(x: Array, w: Array | Quantized | None, bias: Array | None, group: Array) -> Array | None:
    """The pre-activation of one factor, rounded as it is kept."""
    return None if w is None else _plus(times(x, weight_of(w, group, x.dtype), False), bias, group).astype(x.dtype)


def _plus(rows: Array, bias: Array | None, group: Array) -> Array:
    return rows if bias is None else rows + bias[group][None].astype(F32)


def _no_slope(x: Array, w: Array | Quantized | None) -> Array | None:
    return None if w is None or isinstance(w, Quantized) else zeros(x, *w.shape, dtype=F32)


def _finished(w: Array | Quantized | None, slope: Array | None) -> Array | Quantized | None:
    return no_gradient(w) if slope is None or isinstance(w, Quantized | None) else slope.astype(w.dtype)


def _add(slope: Array | None, rows: Array, cotangents: Array, group: Array) -> Array | None:
    return None if slope is None else add_to(slope, jnp.dot(rows.T, cotangents, preferred_element_type=F32), group)


def _add_sum(slope: Array | None, rows: Array, group: Array) -> Array | None:
    return None if slope is None else add_to(slope, jnp.sum(rows, axis=0), group)
