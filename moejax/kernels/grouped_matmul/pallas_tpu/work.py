"""The work list: which tile of rows meets which group, in the order in which a core takes them.

A tile of rows that groups share is taken once for each, one after the other. Groups without rows are not taken, unless `empty` asks.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Int


class Work(NamedTuple):
    """Scalars that a kernel reads ahead of its data. An item is one tile of rows against one group."""

    first: Int[Array, " cores"]
    """First item of each core."""
    number: Int[Array, " cores"]
    """Items of each core."""
    tile: Int[Array, " items"]
    """Tile of rows of each item."""
    run: Int[Array, " items"]
    """Which of the groups taken."""
    group: Int[Array, " runs"]
    """Of the groups taken, which group it is."""
    bounds: Int[Array, " G+1"]
    """First row of each group, and the first row after the last."""


def make(
    group_sizes: Int[Array, " G"],
    start: Int[Array, ""],
    rows: int,
    tile: int,
    cores: int,
    *,
    share_rows: bool,
    empty: bool = False,
) -> Work:
    """The items for `rows` rows in tiles of `tile`. With `share_rows` each core takes some of the items, cut between two tiles of rows;
    without it each core takes all of them. A core without items is given a tile in which no group has rows."""
    groups, tiles = group_sizes.shape[0], -(-rows // tile)
    stops = start + jnp.cumsum(group_sizes, dtype=jnp.int32)
    starts = stops - group_sizes
    from_tile = jnp.minimum(starts // tile, tiles - 1)
    taken = jnp.where(group_sizes > 0, (stops - 1) // tile - from_tile + 1, int(empty))
    ends = jnp.cumsum(taken, dtype=jnp.int32)
    total = ends[-1]

    items = jnp.arange(tiles + groups, dtype=jnp.int32)
    item = jnp.clip(items, 0, jnp.maximum(total - 1, 0))[:, None]
    before = (ends - taken)[None, :]
    mine = (before <= item) & (item < ends[None, :])
    owned = jnp.cumsum(taken > 0, dtype=jnp.int32)
    # Sums over groups of which all but one term are zero: on a TPU cheaper than a gather.
    row_tile = jnp.sum(jnp.where(mine, from_tile[None, :] + item - before, 0), axis=1)
    run = jnp.sum(jnp.where(mine, owned[None, :] - 1, 0), axis=1)
    group = jnp.minimum(
        jnp.sum(owned[None, :] <= jnp.arange(groups, dtype=jnp.int32)[:, None], axis=1, dtype=jnp.int32), groups - 1
    )

    first, count = jnp.zeros((cores,), jnp.int32), jnp.full((cores,), total)
    if share_rows and cores == 2:
        cut = _middle(row_tile, items, total)
        first = jnp.stack([0, jnp.where(cut < total, cut, items[-1])])
        count = jnp.stack([cut, total - cut])
        # The last place of the list is nobody's: a core without items is sent from there to a tile beside the only one with rows.
        aside = jnp.where(row_tile[0] > 0, row_tile[0] - 1, jnp.minimum(row_tile[-1] + 1, tiles - 1))
        row_tile = row_tile.at[-1].set(aside)
    return Work(first, count, row_tile, run, group, jnp.concatenate([starts[:1], stops]))


def _middle(row_tile: Array, items: Array, total: Array) -> Array:
    """The item nearest the middle that is the first of its tile of rows; `total` if there is but one tile."""
    opens = (row_tile != jnp.roll(row_tile, 1)) & (items > 0) & (items < total)
    away = jnp.where(opens, jnp.abs(items - total // 2), items.size)
    return jnp.where(jnp.any(opens), jnp.argmin(away).astype(jnp.int32), total)
