"""The experts as a gather, a grouped GLU and a grouped matmul, on any backend of these."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array

from moejax.arrays import no_gradient
from moejax.kernels.activations import Activation
from moejax.kernels.grouped_matmul import Groups, backend
from moejax.kernels.grouped_matmul.api import sum_of_groups
from moejax.kernels.grouped_matmul.backend import rows_of_groups
from moejax.kernels.grouped_mlp.glu import grouped_dglu, grouped_glu
from moejax.kernels.grouped_mlp.weights import Weights
from moejax.kernels.quantized import Quantized


class Kept(NamedTuple):
    """What the backward pass has of the forward one, beside its arguments."""

    gate_h: Array | None
    up_h: Array


class Slopes(NamedTuple):
    """Gradients of what `forward` takes; of the rows as they lie, whatever source they were gathered from."""

    rows: Array
    weights: Weights
    row_weight: Array | None


def forward(
    x: Array,
    index: Array | None,
    groups: Groups,
    weights: Weights,
    row_weight: Array | None,
    activation: Activation,
    impl: str,
) -> tuple[Array, Kept]:
    """y [R, D] and what the backward pass keeps."""
    a, gate_h, up_h = grouped_glu(
        _rows(x, index), weights.gate, weights.up, groups, activation=activation, gate_bias=weights.gate_bias,
        up_bias=weights.up_bias, impl=impl,
    )  # fmt: skip
    y = backend(impl).matmul((a,), (weights.down,), groups, False, weights.down_bias, x.dtype)
    return weighted(y, row_weight), Kept(gate_h, up_h)


def backward(
    x: Array,
    index: Array | None,
    groups: Groups,
    weights: Weights,
    row_weight: Array | None,
    kept: Kept,
    activation: Activation,
    dy: Array,
    impl: str,
) -> Slopes:
    """All gradients for the cotangent dy [R, D] of y."""
    own, rows = backend(impl), _rows(x, index)
    d_gate_h, d_up_h, a, d_weight = grouped_dglu(
        dy, weights.down, kept.gate_h, kept.up_h, row_weight, groups, activation=activation, impl=impl
    )
    pairs = [(d_up_h, weights.up)] if d_gate_h is None else [(d_gate_h, weights.gate), (d_up_h, weights.up)]
    d_rows = own.matmul(*map(tuple, zip(*pairs, strict=True)), groups, True, None, x.dtype)

    def of(w: Array | Quantized | None, rows: Array, slope: Array | None) -> Array | Quantized | None:
        if w is None or isinstance(w, Quantized):
            return no_gradient(w)
        return own.weight_gradient(rows, slope, groups, w.dtype)

    def of_bias(bias: Array | None, slope: Array | None) -> Array | None:
        return None if bias is None else sum_of_groups(slope, groups, bias.dtype)

    if weights.down_bias is not None and d_weight is not None:
        bias = rows_of_groups(weights.down_bias, groups, dy.shape[0])
        d_weight = d_weight + jnp.sum(dy.astype(jnp.float32) * bias, axis=1)
    slopes = Weights(
        up=of(weights.up, rows, d_up_h),
        down=of(weights.down, a, dy),
        gate=of(weights.gate, rows, d_gate_h),
        up_bias=of_bias(weights.up_bias, d_up_h),
        down_bias=of_bias(weights.down_bias, weighted(dy, row_weight)),
        gate_bias=of_bias(weights.gate_bias, d_gate_h),
    )
    return Slopes(d_rows, slopes, d_weight)


def weighted(y: Array, row_weight: Array | None) -> Array:
    return y if row_weight is None else (y.astype(jnp.float32) * row_weight[:, None]).astype(y.dtype)


def _rows(x: Array, index: Array | None) -> Array:
    return x if index is None else x[index]
