"""Portable XLA for loads that are nearly even: every group padded to one static size, and one batched matmul for all of them.

It costs max over mean load times the ideal FLOPs, at the speed of a dense matmul; `cpu` takes it where that is a bargain.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from moejax.kernels import quantized
from moejax.kernels.activations import Activation
from moejax.kernels.grouped_matmul import Groups
from moejax.kernels.grouped_matmul.api import no_gradient
from moejax.kernels.grouped_matmul.backend import group_of_row, stops
from moejax.kernels.grouped_mlp.composed import Kept, Slopes
from moejax.kernels.grouped_mlp.weights import Weights
from moejax.kernels.quantized import Quantized

F32 = jnp.float32


class Slots(NamedTuple):
    row: Int[Array, "E C"]
    """Row at each slot; any row where there is none."""
    live: Bool[Array, "E C 1"]
    slot: Int[Array, " R"]
    """Slot of each row, counted through all groups; any slot for a row that no group owns."""


def slots(groups: Groups, rows: int, capacity: int) -> Slots:
    """Where rows lie in buffers of `capacity` slots a group; no group may have more rows than that."""
    first, place = stops(groups) - groups.sizes, jnp.arange(capacity, dtype=jnp.int32)
    row = jnp.minimum(first[:, None] + place[None, :], rows - 1)
    group = jnp.minimum(group_of_row(groups, rows), groups.sizes.shape[0] - 1)
    slot = group * capacity + jnp.arange(rows, dtype=jnp.int32) - first[group]
    return Slots(row, (place[None, :] < groups.sizes[:, None])[..., None], slot)


def forward(
    x: Array,
    index: Array,
    groups: Groups,
    weights: Weights,
    row_weight: Array | None,
    activation: Activation,
    room: int,
    capacity: int,
) -> tuple[Array, Kept]:
    """y [R, D], and pre-activations [room, F], slot by slot."""
    at = slots(groups, index.shape[0], capacity)
    x_slots = x[index[at.row]]
    gate_h = _hidden(x_slots, weights.gate, weights.gate_bias)
    up_h = _hidden(x_slots, weights.up, weights.up_bias)
    a = activation.value(gate_h, up_h).astype(x.dtype)
    y = _plus(_matmul("ecf,efd->ecd", a, weights.down), weights.down_bias).astype(x.dtype)
    if row_weight is not None:
        y = (y.astype(F32) * row_weight[at.row][..., None]).astype(x.dtype)
    rows = y.reshape(-1, x.shape[1]).at[at.slot].get(mode="clip")
    return rows, Kept(None if gate_h is None else _in_room(gate_h, room), _in_room(up_h, room))


def backward(
    x: Array,
    index: Array,
    groups: Groups,
    weights: Weights,
    row_weight: Array | None,
    kept: Kept,
    activation: Activation,
    dy: Array,
    capacity: int,
) -> Slopes:
    """All gradients for the cotangent dy [R, D] of y."""
    at = slots(groups, index.shape[0], capacity)
    x_slots = x[index[at.row]]
    dy_slots = jnp.where(at.live, dy[at.row], 0)
    used = at.row.size
    gate_h, up_h = (None if h is None else jnp.where(at.live, h[:used].reshape(*at.row.shape, -1), 0) for h in kept)
    a = activation.value(gate_h, up_h)
    da = _matmul("ecd,efd->ecf", dy_slots, weights.down)
    d_weight, dy_bias = None, dy_slots
    if row_weight is not None:
        factor = jnp.where(at.live, row_weight[at.row][..., None], 0)
        sums = jnp.sum(da * a, axis=2)
        if weights.down_bias is not None:
            sums = sums + jnp.einsum("ecd,ed->ec", dy_slots, weights.down_bias, preferred_element_type=F32)
        d_weight = sums.reshape(-1).at[at.slot].get(mode="clip")
        da, a, dy_bias = da * factor, a * factor, dy_slots.astype(F32) * factor
    d_gate, d_up = activation.gradient(gate_h, up_h, da)
    slope = {"gate": d_gate, "up": d_up}
    cast = {name: s.astype(x.dtype) for name, s in slope.items() if s is not None}
    parts = [_matmul("ecf,edf->ecd", s, getattr(weights, name)) for name, s in cast.items()]
    d_x = sum(parts[1:], parts[0]).astype(x.dtype).reshape(-1, x.shape[1]).at[at.slot].get(mode="clip")
    x_live = jnp.where(at.live, x_slots, 0)
    found = Weights(
        up=_gradient("ecd,ecf->edf", x_live, cast["up"], weights.up),
        down=_gradient("ecf,ecd->efd", a.astype(x.dtype), dy_slots, weights.down),
        gate=None if weights.gate is None else _gradient("ecd,ecf->edf", x_live, cast["gate"], weights.gate),
        up_bias=_total(weights.up_bias, d_up),
        down_bias=_total(weights.down_bias, dy_bias),
        gate_bias=_total(weights.gate_bias, d_gate),
    )
    return Slopes(d_x, found, d_weight)


def _matmul(what: str, rows: Array, w: Array | Quantized) -> Array:
    return jnp.einsum(what, rows, quantized.whole(w, rows.dtype), preferred_element_type=F32)


def _plus(rows: Array, bias: Array | None) -> Array:
    return rows if bias is None else rows + bias[:, None].astype(F32)


def _hidden(x: Array, w: Array | Quantized | None, bias: Array | None) -> Array | None:
    return None if w is None else _plus(_matmul("ecd,edf->ecf", x, w), bias).astype(x.dtype)


def _in_room(h: Array, room: int) -> Array:
    """[E, C, F] as the first of `room` rows."""
    flat = h.reshape(-1, h.shape[-1])
    return jnp.pad(flat, ((0, room - flat.shape[0]), (0, 0)))


def _gradient(what: str, rows: Array, cotangents: Array, w: Array | Quantized) -> Array | Quantized:
    if isinstance(w, Quantized):
        return no_gradient(w)
    return jnp.einsum(what, rows, cotangents, preferred_element_type=F32).astype(w.dtype)


def _total(bias: Array | None, rows: Array | None) -> Array | None:
    return None if bias is None else jnp.sum(rows, axis=1, dtype=F32).astype(bias.dtype)
