"""What a backend of the grouped matmul is, and what all of them share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from moejax.kernels.activations import Activation


class Groups(NamedTuple):
    """Rows contiguous by group: group g owns sizes[g] rows after those of the groups before it."""

    sizes: Int[Array, " G"]
    start: Int[Array, ""] | None = None
    """First row of group 0; None for 0."""

    @property
    def first(self) -> Int[Array, ""] | int:
        return 0 if self.start is None else self.start


class Backend(NamedTuple):
    """Plain functions without derivatives; `api` makes the derivative of each from the others.

    Rows that no group owns are unspecified in what they return, and never read into it.
    """

    matmul: Callable[..., Array]
    """(xs, ws, groups, transpose_w, bias, out_dtype) -> [M, N]: the sum over one or two pairs of x [M, K] and w [G, K, N]
    ([G, N, K] if transposed), plus the group's bias [G, N] unless it is None."""
    weight_gradient: Callable[..., Array]
    """(x [M, K], dy [M, N], groups, out_dtype, into=None) -> [G, K, N], plus `into` in fp32 where it is given; an empty group adds
    exactly zero."""
    glu: Callable[..., Any] | None = None
    """(x, gate, up, gate_bias, up_bias, groups, activation) -> (a, gate_h, up_h); None where the pieces are composed."""
    dglu: Callable[..., Any] | None = None
    """(dy, down, gate_h, up_h, row_weight, groups, activation) -> (d_gate_h, d_up_h, weighted a, d_row_weight)."""
    platform: str | None = None
    """What its kernels are written for: tpu or gpu; elsewhere they are interpreted. None for what compiles anywhere."""


def added(dw: Array, into: Array | None, out_dtype: jnp.dtype) -> Array:
    """A gradient in fp32 on top of another, rounded once."""
    return (dw if into is None else into.astype(jnp.float32) + dw).astype(out_dtype)


def stops(groups: Groups) -> Int[Array, " G"]:
    """First row after each group."""
    return groups.first + jnp.cumsum(groups.sizes, dtype=jnp.int32)


def group_of_row(groups: Groups, rows: int) -> Int[Array, " M"]:
    """Group of each row, G for rows that none owns."""
    row = jnp.arange(rows, dtype=jnp.int32)
    group = jnp.sum(row[:, None] >= stops(groups)[None, :], axis=1, dtype=jnp.int32)
    return jnp.where(row >= groups.first, group, groups.sizes.shape[0])


def owned(groups: Groups, rows: int) -> Bool[Array, "M 1"]:
    """Rows that some group owns."""
    row = jnp.arange(rows, dtype=jnp.int32)[:, None]
    return (row >= groups.first) & (row < groups.first + jnp.sum(groups.sizes, dtype=jnp.int32))


def rows_of_groups(values: Array, groups: Groups, rows: int) -> Array:
    """[G, N] -> [M, N]: to every row what its group has; anything for rows that none owns."""
    return values.at[group_of_row(groups, rows)].get(mode="clip")


def composed_glu(
    backend: Backend, x: Array, gate: Any, up: Any, gate_bias: Any, up_bias: Any, groups: Groups, activation: Activation
) -> tuple[Array, Array | None, Array]:
    """(a, gate_h, up_h) from plain matmuls: the pre-activations are rounded before they are activated, as a backward pass will."""
    gate_h = None if gate is None else backend.matmul((x,), (gate,), groups, False, gate_bias, x.dtype)
    up_h = backend.matmul((x,), (up,), groups, False, up_bias, x.dtype)
    return activation.value(gate_h, up_h).astype(x.dtype), gate_h, up_h
