"""The experts of one device on rows that lie in the order of experts."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moejax.kernels.activations import Activation
from moejax.kernels.gather_sum import gather_sum
from moejax.kernels.grouped_mlp import Weights, grouped_mlp


class Rows(NamedTuple):
    """The source of the rows, and which of its rows each sorted row is."""

    x: Float[Array, "M D"]
    row_index: Int[Array, " R"]
    inverse: Int[Array, "M K"] | None = None
    """Sorted rows of each row of x, past the end where there are fewer than K; None where they are not equally many."""


def experts(
    rows: Rows,
    group_sizes: Int[Array, " L"],
    weights: tuple[Weights, ...],
    impl: str,
    activation: Activation,
) -> Float[Array, "R D"]:
    """Each row through the expert whose group it lies in. One class of widths after another: each sees its rows first in line.
    Rows past the last group are unspecified."""
    x, row_index, inverse = rows
    if len(weights) == 1:
        return grouped_mlp(x, row_index, group_sizes, weights[0], activation=activation, inverse=inverse, impl=impl)
    sizes = group_sizes.reshape(len(weights), -1)
    totals = jnp.sum(sizes, axis=1, dtype=jnp.int32)
    first, place = jnp.cumsum(totals, dtype=jnp.int32) - totals, jnp.arange(row_index.shape[0], dtype=jnp.int32)
    y = jnp.zeros_like(x, shape=(row_index.shape[0], x.shape[1]))
    for i, w in enumerate(weights):
        ahead = row_index.at[place + first[i]].get(mode="clip")
        mine = grouped_mlp(x, ahead, sizes[i], w, activation=activation, impl=impl)
        back, here = place - first[i], (place >= first[i]) & (place < first[i] + totals[i])
        y = jnp.where(here[:, None], mine.at[back].get(mode="clip"), y)
    return y


def home(
    rows: Float[Array, "R D"],
    row: Int[Array, " A"],
    token: Int[Array, " A"],
    gate: Float[Array, " A"],
    tokens: int,
    by_token: bool,
) -> Float[Array, "N D"]:
    """Every assignment's row times its gate, summed by token in fp32; nothing for a row past the end."""
    if by_token:
        return gather_sum(rows, row.reshape(tokens, -1), gate.reshape(tokens, -1))
    mine = rows.at[row].get(mode="fill", fill_value=0).astype(jnp.float32)
    gated = mine * jnp.where(row < rows.shape[0], gate, 0)[:, None]
    return jnp.zeros_like(gated, shape=(tokens, rows.shape[-1])).at[token].add(gated)
