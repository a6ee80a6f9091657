"""Portable XLA, fused: gather, gate and up, activation and down for one block of rows after another; likewise backward."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array

from moejax.arrays import no_gradient
from moejax.kernels.activations import Activation
from moejax.kernels.grouped_matmul import Groups, blocks
from moejax.kernels.grouped_matmul.blocked import product_over_rows, times, turned, weight_of
from moejax.kernels.grouped_matmul.blocks import Block, overhang, put_group, put_rows, rows_at, unwritten, zeros
from moejax.kernels.grouped_mlp.composed import Kept, Slopes
from moejax.kernels.grouped_mlp.weights import Weights
from moejax.kernels.quantized import Quantized

F32 = jnp.float32


def forward(
    x: Array, index: Array, groups: Groups, weights: Weights, row_weight: Array | None, activation: Activation
) -> tuple[Array, Kept]:
    """y [R, D], and the pre-activations [R and more, F] in the order of rows."""
    rows, hidden = index.shape[0], weights.up.shape[2]
    work = blocks.cut(groups, rows)
    index = overhang(index, work.over)
    factors = None if row_weight is None else overhang(row_weight, work.over)

    def visit(group: Array, carry: tuple[Array, Kept]) -> tuple[Array, Kept]:
        own = _own(weights, group, x.dtype)

        def turn(block: Block, carry: tuple[Array, Kept]) -> tuple[Array, Kept]:
            y, kept = carry
            x_block = x[rows_at(index, block)]
            gate_h, up_h = _hidden(x_block, own.gate, own.gate_bias), _hidden(x_block, own.up, own.up_bias)
            a = activation.value(gate_h, up_h).astype(x.dtype)
            y_block = _plus(times(a, own.down, False), own.down_bias)
            if factors is not None:
                y_block = y_block.astype(x.dtype).astype(F32) * rows_at(factors, block)[:, None]
            gate_rows = None if gate_h is None else put_rows(kept.gate_h, gate_h, block)
            return put_rows(y, y_block, block), Kept(gate_rows, put_rows(kept.up_h, up_h, block))

        return work.each_block(group, turn, carry)

    room = rows + work.over
    kept = Kept(None if weights.gate is None else unwritten(x, room, hidden), unwritten(x, room, hidden))
    y, kept = work.each_group(visit, (unwritten(x, room, x.shape[1]), kept))
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
    index, dy = overhang(index, work.over), overhang(dy, work.over)
    factors = None if row_weight is None else overhang(row_weight, work.over)

    def visit(group: Array, slopes: Slopes) -> Slopes:
        own = _own(weights, group, x.dtype)

        def turn(block: Block, carry: Slopes) -> Slopes:
            mine = block.mine
            x_block = jnp.where(mine, x[rows_at(index, block)], 0)
            dy_block = jnp.where(mine, rows_at(dy, block), 0)
            h = Kept(*(None if h is None else jnp.where(mine, rows_at(h, block), 0) for h in kept))
            factor = None if factors is None else jnp.where(mine, rows_at(factors, block)[:, None], 0)
            d_x, slope, d_factor = _of_block(x_block, dy_block, h, factor, own, activation)
            d_weight = None if d_factor is None else put_rows(carry.row_weight, d_factor, block)
            total = Weights(*(_add(a, b) for a, b in zip(carry.weights, slope, strict=True)))
            return Slopes(put_rows(carry.rows, d_x, block), total, d_weight)

        none = Weights(*(None if s is None else zeros(x, *s.shape[1:], dtype=F32) for s in slopes.weights))
        after = work.each_block(group, turn, slopes._replace(weights=none))
        parts = zip(slopes.weights, after.weights, strict=True)
        return after._replace(weights=Weights(*(None if w is None else put_group(w, own, group) for w, own in parts)))

    none = Weights(*(None if isinstance(w, Quantized | None) else zeros(x, *w.shape, dtype=F32) for w in weights))
    room = rows + work.over
    d_weight = None if row_weight is None else unwritten(x, room, dtype=F32)
    slopes = work.each_group(visit, Slopes(unwritten(x, room, x.shape[1]), none, d_weight))
    parts = zip(weights, slopes.weights, strict=True)
    found = Weights(*(no_gradient(w) if isinstance(w, Quantized | None) else s.astype(w.dtype) for w, s in parts))
    return Slopes(slopes.rows[:rows], found, None if d_weight is None else slopes.row_weight[:rows])


def _of_block(
    x: Array, dy: Array, h: Kept, factor: Array | None, own: Weights, activation: Activation
) -> tuple[Array, Weights, Array | None]:
    """Gradients of one block's rows, of its group's parameters and of its factors."""
    a, da, d_factor, d_out = activation.value(*h), times(dy, own.down, True), None, dy.astype(F32)
    if factor is not None:
        d_factor = jnp.sum(da * a, axis=1)
        if own.down_bias is not None:
            d_factor = d_factor + jnp.sum(d_out * own.down_bias[None].astype(F32), axis=1)
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
        up_bias=jnp.sum(d_up, axis=0),
        down_bias=jnp.sum(d_out, axis=0),
        gate_bias=None if d_gate is None else jnp.sum(d_gate, axis=0),
    )
    return sum(d_x[1:], d_x[0]), slopes, d_factor


def _own(weights: Weights, group: Array, dtype: jnp.dtype) -> Weights:
    """One group's weights [K, N] and biases [N]."""
    return Weights(*(None if w is None else weight_of(w, group, dtype) for w in weights))


def _hidden(x: Array, w: Array | None, bias: Array | None) -> Array | None:
    """The pre-activation of one factor, rounded as it is kept."""
    return None if w is None else _plus(times(x, w, False), bias).astype(x.dtype)


def _plus(rows: Array, bias: Array | None) -> Array:
    return rows if bias is None else rows + bias[None].astype(F32)


def _add(total: Array | None, part: Array | None) -> Array | None:
    """Nothing where there is no parameter to have a gradient."""
    return None if total is None or part is None else total + part
