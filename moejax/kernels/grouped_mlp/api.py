"""A layer of experts on sorted rows: one signature; fused where the backend has it."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moejax.kernels.grouped_matmul import pick
from moejax.kernels.grouped_mlp import blocked, composed
from moejax.kernels.grouped_mlp.weights import Weights

FUSED: dict[str, Any] = {"blocked": blocked.grouped_mlp}


def grouped_mlp(
    x: Float[Array, "M D"],
    row_index: Int[Array, " R"] | None,
    group_sizes: Int[Array, " E"],
    weights: Weights,
    row_weight: Float[Array, " R"] | None = None,
    *,
    impl: str = "auto",
    clamp: float | None = None,
) -> Float[Array, "R D"]:
    """Each row through the expert that owns it.

    Args:
      x: [M, D], the source of the rows.
      row_index: i32[R], which row of x each row is; None takes x as it lies.
      group_sizes: i32[E], rows of each expert, contiguous and in order; sum at most R. Empty groups get zero gradient.
      weights: one width of experts.
      row_weight: f32[R], a factor on each row's output; None for one.
      impl: a grouped matmul backend, or auto.
      clamp: limit of the activation's factors; None for none.

    Returns:
      [R, D] in x's dtype. Rows past the last group are unspecified: select, never multiply.
    """
    impl = pick(impl)
    index = jnp.arange(x.shape[0], dtype=jnp.int32) if row_index is None else row_index
    if impl in FUSED:
        y = FUSED[impl](x, index, group_sizes, weights, clamp)
    else:
        y = composed.grouped_mlp(x, index, group_sizes, weights, impl, clamp)
    return y if row_weight is None else (y.astype(jnp.float32) * row_weight[:, None]).astype(x.dtype)
