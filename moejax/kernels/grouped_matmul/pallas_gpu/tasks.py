"""The work list: which tile of which group each block takes. Made by XLA before the kernel starts, so that it can be tested alone.

Tiles of a group begin at the multiple of 8 rows at or before its first row, where a transfer may begin, and are cut from there. So
the first and the last tile of a group hold rows of its neighbours too: what comes of them is not stored.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from moejax.kernels.grouped_matmul.pallas_gpu.tiles import ALIGNED, ROWS

I32 = jnp.int32


class Task(NamedTuple):
    """One tile of y: rows first..stop of group `group`, in the tile that begins at `row` (a multiple of 8) and `column`."""

    group: Int[Array, "*T"]
    row: Int[Array, "*T"]
    first: Int[Array, "*T"]
    stop: Int[Array, "*T"]
    column: Int[Array, "*T"]


class Tasks(NamedTuple):
    table: Int[Array, "5 T"]
    """A Task in every column; those from `total` on are not done."""
    total: Int[Array, "1"]


def of_rows(
    group_sizes: Int[Array, " G"], start: Int[Array, ""], rows: int, columns: int, tile_columns: int, panel: int
) -> Tasks:
    """Tiles of y[rows, columns], group after group, in panels of `panel` tiles of columns that walk down the rows of the group.

    Blocks take neighbouring tasks at the same time, so these share rows or weights in L2. Every other panel walks up.
    """
    groups, across = group_sizes.shape[0], -(-columns // tile_columns)
    stops = start + jnp.cumsum(group_sizes, dtype=I32)
    firsts = stops - group_sizes
    begins = firsts // ALIGNED * ALIGNED
    down = jnp.where(group_sizes > 0, -(-(stops - begins) // ROWS), 0)
    ends = jnp.cumsum(down * across, dtype=I32)
    most = (rows + groups * (ALIGNED + ROWS - 2)) // ROWS * across
    task = jnp.arange(most, dtype=I32)
    group = jnp.minimum(jnp.sum(task[:, None] >= ends[None, :], axis=1, dtype=I32), groups - 1)
    height = jnp.maximum(down, 1)[group]
    within = task - (ends - down * across)[group]
    left = within // (height * panel) * panel
    width = jnp.clip(across - left, 1, panel)
    inside = within - left * height
    row_tile, column_tile = inside // width, left + inside % width
    row_tile = jnp.where(left // panel % 2 == 0, row_tile, height - 1 - row_tile)
    row = begins[group] + row_tile * ROWS
    first, stop = jnp.maximum(row, firsts[group]), jnp.minimum(row + ROWS, stops[group])
    return Tasks(jnp.stack(Task(group, row, first, stop, column_tile * tile_columns)), ends[-1:])


def read(table: Any, task: jax.Array) -> Task:
    """A column of the table, in the kernel."""
    return Task(*(table[i, task] for i in range(len(Task._fields))))


def spans(group_sizes: Int[Array, " G"], start: Int[Array, ""]) -> Int[Array, "2 G"]:
    """First row and row after the last of every group."""
    stops = start + jnp.cumsum(group_sizes, dtype=I32)
    return jnp.stack([stops - group_sizes, stops])
