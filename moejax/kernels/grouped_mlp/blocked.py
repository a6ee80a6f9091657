"""Portable XLA, fused: gather, gate and up, activation and down for one wave of blocks after another; likewise backward."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from moejax.arrays import no_gradient
from moejax.kernels.activations import Activation
from moejax.kernels.grouped_matmul import Groups, blocks
from moejax.kernels.grouped_matmul.blocked import masked, plus, product_over_rows, times, turned, weights_of
from moejax.kernels.grouped_matmul.blocks import Wave, add_to_groups, put_rows, rows_at, unwritten, zeros
from moejax.kernels.grouped_mlp.composed import Kept, Slopes
from moejax.kernels.grouped_mlp.weights import Weights
from moejax.kernels.quantized import Quantized

F32 = jnp.float32


def forward(
    x: Array, index: Array, groups: Groups, weights: Weights, row_weight: Array | None, activation: Activation
) -> tuple[Array, Kept]:
    """y [R, D], and the pre-activations [R and more, F] in the order of rows. What is gathered of x is written over by what comes of it: a
    buffer of its own would be filled with zeros first."""
    rows, hidden = index.shape[0], weights.up.shape[2]
    work = blocks.cut(groups, rows)

    def visit(wave: Wave, carry: tuple[Array, Kept]) -> tuple[Array, Kept]:
        y, kept = carry
        own = _own(weights, wave, x.dtype)
        x_rows = rows_at(y, wave)
        gate_h, up_h = _hidden(x_rows, own.gate, own.gate_bias), _hidden(x_rows, own.up, own.up_bias)
        a = activation.value(gate_h, up_h).astype(x.dtype)
        y_rows = plus(times(a, own.down, False), own.down_bias)
        if row_weight is not None:
            y_rows = y_rows.astype(x.dtype).astype(F32) * rows_at(row_weight, wave)[..., None]
        gate_rows = None if gate_h is None else put_rows(kept.gate_h, gate_h, wave)
        return put_rows(y, y_rows, wave), Kept(gate_rows, put_rows(kept.up_h, up_h, wave))

    room = rows + work.over
    kept = Kept(None if weights.gate is None else unwritten(x, room, hidden), unwritten(x, room, hidden))
    if not rows:
        return zeros(x, 0, x.shape[1]), kept
    gathered = x.at[jnp.pad(index, (0, work.over))].get(mode="clip")
    y, kept = work.each(visit, (gathered, kept))
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
    """All gradients for the cotangent dy [R, D] of y. Those of rows are written where their cotangents were, which is a buffer less."""
    rows = index.shape[0]
    work = blocks.cut(groups, rows)

    def visit(wave: Wave, carry: Slopes) -> Slopes:
        factor = None if row_weight is None else rows_at(row_weight, wave)[..., None]
        h = Kept(*(None if h is None else rows_at(h, wave) for h in kept))
        own, dy_rows = _own(weights, wave, x.dtype), masked(rows_at(carry.rows, wave), wave)
        d_x, slope, d_factor = _of_wave(x[rows_at(index, wave)], dy_rows, h, factor, own, activation)
        d_weight = None if d_factor is None else put_rows(carry.row_weight, d_factor, wave)
        parts = zip(carry.weights, slope, strict=True)
        total = Weights(*(None if w is None or part is None else add_to_groups(w, part, wave) for w, part in parts))
        return Slopes(put_rows(carry.rows, d_x, wave), total, d_weight)

    none = Weights(*(None if isinstance(w, Quantized | None) else zeros(x, *w.shape, dtype=F32) for w in weights))
    room = rows + work.over
    d_weight = None if row_weight is None else unwritten(x, room, dtype=F32)
    begin = Slopes(jnp.pad(dy, ((0, work.over), (0, 0))), none, d_weight)
    slopes: Any = work.each(visit, begin) if rows else begin
    parts = zip(weights, slopes.weights, strict=True)
    found = Weights(*(no_gradient(w) if isinstance(w, Quantized | None) else s.astype(w.dtype) for w, s in parts))
    return Slopes(slopes.rows[:rows], found, None if d_weight is None else slopes.row_weight[:rows])


def _of_wave(
    x: Array, dy: Array, h: Kept, factor: Array | None, own: Weights, activation: Activation
) -> tuple[Array, Weights, Array | None]:
    """Gradients of a wave's rows, of each block's group's parameters and of its factors. Rows without a cotangent add nothing."""
    a, da, d_factor, d_out = activation.value(*h), times(dy, own.down, True), None, dy.astype(F32)
    if factor is not None:
        d_factor = jnp.sum(da * a, axis=2)
        if own.down_bias is not None:
            d_factor = d_factor + jnp.sum(d_out * own.down_bias[:, None].astype(F32), axis=2)
        a, da, d_out = a * factor, da * factor, d_out * factor
    d_gate, d_up = activation.gradient(*h, da)
    parts = [(d_up, own.up)] if d_gate is None else [(d_gate, own.gate), (d_up, own.up)]
    d_x = [times(s.astype(x.dtype), w, True) for s, w in parts]

    x_turned = turned(x)

    def of(slope: Array | None) -> Array | None:
        return None if slope is None else product_over_rows(x_turned, slope.astype(x.dtype))

    slopes = Weights(
        up=of(d_up),
        down=product_over_rows(turned(a.astype(x.dtype)), dy),
        gate=of(d_gate),
        up_bias=jnp.sum(d_up, axis=1),
        down_bias=jnp.sum(d_out, axis=1),
        gate_bias=None if d_gate is None else jnp.sum(d_gate, axis=1),
    )
    return sum(d_x[1:], d_x[0]), slopes, d_factor


def _own(weights: Weights, wave: Wave, dtype: jnp.dtype) -> Weights:
    """Each block's weights [B, K, N] and biases [B, N]."""
    return Weights(*(None if w is None else weights_of(w, wave, dtype) for w in weights))


def _hidden(x: Array, w: Array | None, bias: Array | None) -> Array | None:
    """The pre-activation of one factor, rounded as it is kept."""
    return None if w is None else plus(times(x, w, False), bias).astype(x.dtype)
