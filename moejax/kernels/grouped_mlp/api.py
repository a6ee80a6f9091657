"""A layer of experts on sorted rows: one signature; fused where the backend has it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moejax import collectives
from moejax.arrays import no_gradient
from moejax.kernels.activations import SWIGLU, Activation
from moejax.kernels.gather_sum import gather_sum
from moejax.kernels.grouped_matmul import Groups, pick
from moejax.kernels.grouped_matmul.backend import owned
from moejax.kernels.grouped_mlp import blocked, composed
from moejax.kernels.grouped_mlp.composed import Slopes
from moejax.kernels.grouped_mlp.weights import Weights


class Layer(NamedTuple):
    """A backend's own way through the whole layer."""

    forward: Callable[..., tuple[Array, Any]]
    """y, and what the backward pass keeps of it: the pre-activations, in a form of its own."""
    backward: Callable[..., Slopes]


FUSED: dict[str, Layer] = {"blocked": Layer(blocked.forward, blocked.backward)}
"""Backends that do not compose the layer of their grouped matmuls."""


def grouped_mlp(
    x: Float[Array, "M D"],
    row_index: Int[Array, " R"] | None,
    group_sizes: Int[Array, " E"],
    weights: Weights,
    row_weight: Float[Array, " R"] | None = None,
    *,
    activation: Activation = SWIGLU,
    inverse: Int[Array, "M K"] | None = None,
    impl: str = "auto",
) -> Float[Array, "R D"]:
    """Each row through the expert that owns it. The backward pass keeps x and the pre-activations, not the gathered rows, the
    activations or the output.

    Args:
      x: [M, D], the source of the rows.
      row_index: i32[R], which row of x each row is; None takes x as it lies.
      group_sizes: i32[E], rows of each expert, contiguous and in order; sum at most R. Empty groups get zero gradient.
      weights: one width of experts.
      row_weight: f32[R], a factor on each row's output; None for one.
      activation: between the matmuls.
      inverse: i32[M, K], the rows that each row of x became, past the end where there are fewer than K: the gradient of x is then a
        gather. None adds them up one after another.
      impl: a grouped matmul backend, or auto.

    Returns:
      [R, D] in x's dtype. Rows past the last group are unspecified: select, never multiply.
    """
    if activation.gated == (weights.gate is None):
        have = "none" if weights.gate is None else "one"
        raise ValueError(
            f"activation {activation.kind} with gated={activation.gated}, and weights with {have}: give both or neither"
        )
    arrays = x, row_index, inverse, Groups(group_sizes), weights, row_weight
    return _mlp(*collectives.vary_together(*arrays), activation, pick(impl))


def _layer(impl: str, x: Array, row_index: Array | None) -> tuple[Layer, Array | None]:
    """How the layer is run, and the index it is given."""
    if impl in FUSED:
        return FUSED[impl], jnp.arange(x.shape[0], dtype=jnp.int32) if row_index is None else row_index
    bound = functools.partial(composed.forward, impl=impl), functools.partial(composed.backward, impl=impl)
    return Layer(*bound), row_index


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7))
def _mlp(
    x: Array,
    row_index: Array | None,
    inverse: Array | None,
    groups: Groups,
    weights: Weights,
    row_weight: Array | None,
    activation: Activation,
    impl: str,
) -> Array:
    return _forward(x, row_index, inverse, groups, weights, row_weight, activation, impl)[0]


def _forward(x, row_index, inverse, groups, weights, row_weight, activation, impl):
    layer, index = _layer(impl, x, row_index)
    y, kept = layer.forward(x, index, groups, weights, row_weight, activation)
    return y, (x, row_index, inverse, groups, weights, row_weight, kept)


def _backward(activation: Activation, impl: str, residuals: tuple, dy: Array):
    x, row_index, inverse, groups, weights, row_weight, kept = residuals
    layer, index = _layer(impl, x, row_index)
    slopes = layer.backward(x, index, groups, weights, row_weight, kept, activation, dy)
    live = owned(groups, dy.shape[0])
    rows = jnp.where(live, slopes.rows, jnp.zeros((), slopes.rows.dtype))
    if row_index is None:
        dx = rows
    elif inverse is None:
        dx = jnp.zeros_like(x).at[row_index].add(rows)
    else:
        dx = gather_sum(rows, inverse).astype(x.dtype)
    d_row_weight = None if row_weight is None else jnp.where(live[:, 0], slopes.row_weight, 0).astype(row_weight.dtype)
    return dx, no_gradient(row_index), no_gradient(inverse), no_gradient(groups), slopes.weights, d_row_weight


_mlp.defvjp(_forward, _backward)
