"""`lax.ragged_dot`: on TPU a Mosaic kernel inside the compiler, on CPU about G times the ideal FLOPs."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array

from moejax.kernels import quantized
from moejax.kernels.grouped_matmul.backend import Backend, Groups, added, owned, rows_of_groups

ROWS_BY_GROUP = jax.lax.RaggedDotDimensionNumbers(
    dot_dimension_numbers=(((0,), (0,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[]
)
"""x^T dy, group by group: the ragged dimension is the one summed over."""


def _to_front(x: Array, groups: Groups) -> Array:
    """The rows of group 0 first."""
    return x if groups.start is None else jnp.roll(x, -groups.start, axis=0)


def _matmul(xs: tuple, ws: tuple, groups: Groups, transpose_w: bool, bias: Array | None, out_dtype: jnp.dtype) -> Array:
    y = jnp.zeros((), jnp.float32)
    for x, w in zip(xs, ws, strict=True):
        w = quantized.whole(w, x.dtype)
        w = w.swapaxes(1, 2) if transpose_w else w
        y = y + jax.lax.ragged_dot(_to_front(x, groups), w, groups.sizes, preferred_element_type=jnp.float32)
    y = y if groups.start is None else jnp.roll(y, groups.start, axis=0)
    return (y if bias is None else y + rows_of_groups(bias, groups, y.shape[0])).astype(out_dtype)


def _weight_gradient(x: Array, dy: Array, groups: Groups, out_dtype: jnp.dtype, into: Array | None = None) -> Array:
    live = owned(groups, x.shape[0])
    x, dy = (_to_front(jnp.where(live, a, jnp.zeros((), a.dtype)), groups) for a in (x, dy))
    dw = jax.lax.ragged_dot_general(x, dy, groups.sizes, ROWS_BY_GROUP, preferred_element_type=jnp.float32)
    return added(dw, into, out_dtype)


BACKEND = Backend(_matmul, _weight_gradient)
