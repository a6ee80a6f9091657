"""Groups of contiguous rows cut into blocks, and loops over waves of blocks of about the same number of rows; all of dynamic trip count.

A wave is one batched matmul, each block with its own group's weight: on a CPU the threads of one block's matmul wait for each other, those
of a batch do not. Blocks are put in order of their rows, so that a wave of fixed shape holds few empty rows. What is read past a block's
last row is that row again, to be masked where it would be summed; what lies there is not written.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from moejax import collectives
from moejax.kernels.grouped_matmul.backend import Groups, stops

LADDER = 576, 448, 320, 192, 96, 32
"""Rows that a block of a wave has room for. Finer steps leave fewer rows empty and compile longer (docs/experiments.md, 2026-12-01)."""
TOGETHER = 8
"""Blocks of a wave, at most; each has a copy of its group's weight. Of few groups a wave takes a quarter, since the last is filled up."""


class Wave(NamedTuple):
    """Some blocks: rows `row` to `row + rows` of the buffer, which are `group`'s, with room for `size`."""

    group: Int[Array, " B"]
    row: Int[Array, " B"]
    rows: Int[Array, " B"]
    size: int

    @property
    def places(self) -> Int[Array, "B S"]:
        """Rows of the buffer, the last of a block as often as fills it."""
        return self.row[:, None] + jnp.minimum(self._slot, jnp.maximum(self.rows - 1, 0)[:, None])

    @property
    def mine(self) -> Bool[Array, "B S"]:
        """Which of those are the block's, and no repetition."""
        return self._slot < self.rows[:, None]

    @property
    def _slot(self) -> Int[Array, "1 S"]:
        return jnp.arange(self.size, dtype=jnp.int32)[None]


class Waves(NamedTuple):
    """The work list in closed form: blocks, those of most rows first."""

    group: Int[Array, "W B"]
    row: Int[Array, "W B"]
    rows: Int[Array, "W B"]
    """Zero in blocks that fill the last wave. They repeat the first block, so that nothing is read that no group owns."""
    sizes: tuple[int, ...]
    """What waves have room for, falling."""

    @property
    def over(self) -> int:
        """Rows that a slice may reach past the buffer."""
        return self.sizes[0]

    def each(self, visit: Callable[[Wave, Any], Any], carry: Any) -> Any:
        """visit(wave, carry) for every wave that has rows, each with the least room that holds its blocks."""
        begin = jnp.zeros_like(self.rows, shape=())
        for size, smaller in zip(self.sizes, (*self.sizes[1:], 0), strict=True):

            def turn(i: Array, carry: Any, size: int = size) -> Any:
                return visit(Wave(self.group[i], self.row[i], self.rows[i], size), carry)

            end = jnp.sum(self.rows[:, 0] > smaller, dtype=jnp.int32)
            carry = jax.lax.fori_loop(begin, end, turn, carry)
            begin = end
        return carry


def block_sizes(rows: int, groups: int) -> tuple[int, ...]:
    """Up to twice the mean rows of a group: larger ones would be compiled for few."""
    largest = 2 * rows // max(1, groups)
    return tuple(size for size in LADDER if size <= largest) or LADDER[-1:]


def cut(groups: Groups, rows: int) -> Waves:
    """The waves of these groups, in a buffer of `rows` rows. A group's blocks are of the largest room, but for the last."""
    number, sizes = groups.sizes.shape[0], block_sizes(rows, groups.sizes.shape[0])
    most, room = number + rows // sizes[0], sizes[0]
    together = min(TOGETHER, max(1, number // 4))
    blocks = (groups.sizes + (room - 1)) // room
    last = jnp.cumsum(blocks, dtype=jnp.int32)
    place = jnp.arange(-(-most // together) * together, dtype=jnp.int32)
    group = jnp.minimum(jnp.sum(place[:, None] >= last[None], axis=1, dtype=jnp.int32), number - 1)
    before = (place - (last - blocks)[group]) * room
    own = jnp.where(place < last[-1], jnp.minimum(groups.sizes[group] - before, room), 0)
    row = (stops(groups) - groups.sizes)[group] + before
    order = jnp.argsort(own, descending=True, stable=True)
    kept = own[order]
    order = jnp.where(kept > 0, order, order[0])
    group, row, kept = (found.reshape(-1, together) for found in (group[order], row[order], kept))
    return Waves(group, row, kept, sizes)


def zeros(like: Array, *shape: int, dtype: jax.typing.DTypeLike | None = None) -> Array:
    """Zeros that vary over the same mesh axes as `like`, as a loop's carry inside shard_map must."""
    return jnp.zeros_like(like, shape=shape, dtype=dtype)


def unwritten(like: Array, *shape: int, dtype: jax.typing.DTypeLike | None = None) -> Array:
    """Memory for rows that the loop writes; the others are unspecified, and zeroing them would be a pass over all of it."""
    return collectives.vary_like(jax.lax.empty(shape, dtype or like.dtype), like)


def rows_at(x: Array, wave: Wave) -> Array:
    """x [M, ...] -> [B, S, ...]."""
    return x.at[wave.places].get(mode="promise_in_bounds")


def put_rows(x: Array, rows: Array, wave: Wave) -> Array:
    """x [M, ...] with the blocks' own rows [B, S, ...] in their places, one block after another; in place, since it is in a loop."""

    def put(i: Array, x: Array) -> Array:
        mine = wave.mine[i].reshape(-1, *(1,) * (x.ndim - 1))
        new = jnp.where(mine, rows[i].astype(x.dtype), jax.lax.dynamic_slice_in_dim(x, wave.row[i], wave.size))
        return jax.lax.dynamic_update_slice_in_dim(x, new, wave.row[i], axis=0)

    return jax.lax.fori_loop(0, rows.shape[0], put, x)


def add_to_groups(w: Array, parts: Array, wave: Wave) -> Array:
    """w [G, ...] with what each block [B, ...] adds to its group, one after another; likewise in place."""

    def add(i: Array, w: Array) -> Array:
        return w.at[wave.group[i]].add(parts[i], mode="promise_in_bounds")

    return jax.lax.fori_loop(0, parts.shape[0], add, w)
