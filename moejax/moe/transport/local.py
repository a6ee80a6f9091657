"""The experts of one device on rows that lie in the order of experts."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moejax.kernels.grouped_mlp import Weights, grouped_mlp


class Rows(NamedTuple):
    """The source of the rows, and which of its rows each sorted row is."""

    x: Float[Array, "M D"]
    row_index: Int[Array, " R"]


def experts(
    rows: Rows,
    group_sizes: Int[Array, " L"],
    weights: tuple[Weights, ...],
    impl: str,
    clamp: float | None,
) -> Float[Array, "R D"]:
    """Each row through the expert whose group it lies in. One class of widths after another: each sees its rows first in line.
    Rows past the last group are unspecified."""
    x, row_index = rows
    if len(weights) == 1:
        return grouped_mlp(x, row_index, group_sizes, weights[0], impl=impl, clamp=clamp)
    sizes = group_sizes.reshape(len(weights), -1)
    totals = jnp.sum(sizes, axis=1, dtype=jnp.int32)
    first, place = jnp.cumsum(totals, dtype=jnp.int32) - totals, jnp.arange(row_index.shape[0], dtype=jnp.int32)
    y = jnp.zeros_like(x, shape=(row_index.shape[0], x.shape[1]))
    for i, w in enumerate(weights):
        ahead = row_index.at[place + first[i]].get(mode="clip")
        mine = grouped_mlp(x, ahead, sizes[i], w, impl=impl, clamp=clamp)
        back, here = place - first[i], (place >= first[i]) & (place < first[i] + totals[i])
        y = jnp.where(here[:, None], mine.at[back].get(mode="clip"), y)
    return y
