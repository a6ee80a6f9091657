"""The experts as a gather, two grouped matmuls and an activation: the plain twin of every fused form."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moejax.kernels.grouped_matmul import grouped_matmul
from moejax.kernels.grouped_mlp.weights import Weights, flat, pair, swiglu


def grouped_mlp(
    x: Float[Array, "M D"],
    row_index: Int[Array, " R"],
    group_sizes: Int[Array, " E"],
    weights: Weights,
    impl: str,
    clamp: float | None = None,
) -> Float[Array, "R D"]:
    """See `api.grouped_mlp`."""
    live = jnp.arange(row_index.shape[0])[:, None] < jnp.sum(group_sizes)
    rows = jnp.where(live, x[row_index], 0)
    h = grouped_matmul(rows, flat(weights.gate_up), group_sizes, impl=impl)
    a = jnp.where(live, swiglu(pair(h), clamp), 0)
    return grouped_matmul(a, weights.down, group_sizes, impl=impl)
