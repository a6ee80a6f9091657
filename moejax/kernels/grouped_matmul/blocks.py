"""Loops over groups of contiguous rows, and within a group over blocks of a few fixed numbers of rows; all of dynamic trip count.

The last block of a group may run over into the rows of the next group: what is written there is overwritten when that group's turn comes
(blocks go in order), and what is read there is masked where it would be summed. A group's weights are sliced once for all its blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from moejax import collectives
from moejax.kernels.grouped_matmul.backend import Groups, stops

LADDER = 512, 256, 128, 32
"""Rows of a block. Above, nothing is gained any more; below, a turn of the loop costs as much as the next size up."""
SPARE = 64
"""Rows of a block that may be empty: fewer and larger blocks are faster, since a matmul turns its weight anew for each, which takes as long
as some 40 rows do."""


class Block(NamedTuple):
    """Rows `row` to `row + size` of the buffer; those from `stop` on are another group's."""

    row: Int[Array, ""]
    stop: Int[Array, ""]
    size: int

    @property
    def mine(self) -> Array:
        """Which rows belong to the group, bool[size, 1]."""
        return (self.row + jnp.arange(self.size, dtype=jnp.int32) < self.stop)[:, None]


class Blocks(NamedTuple):
    """The work list in closed form."""

    active: Int[Array, " G"]
    """Groups that have rows, in order, then the others."""
    number: Int[Array, ""]
    """How many have rows."""
    starts: Int[Array, " G"]
    stops: Int[Array, " G"]
    sizes: tuple[int, ...]
    """Rows of a block, falling."""

    @property
    def over(self) -> int:
        """Rows that a block may reach past the buffer."""
        return max(SPARE, self.sizes[-1])

    def each_group(self, visit: Callable[[Array, Any], Any], carry: Any) -> Any:
        """visit(group, carry) for every group that has rows."""
        return jax.lax.fori_loop(0, self.number, lambda i, carry: visit(self.active[i], carry), carry)

    def each_block(self, group: Int[Array, ""], visit: Callable[[Block, Any], Any], carry: Any) -> Any:
        """visit(block, carry) for every block of a group."""
        for size, row, turns in self.series(group):

            def turn(t: Array, carry: Any, size: int = size, row: Array = row) -> Any:
                return visit(Block(row + t * size, self.stops[group], size), carry)

            carry = jax.lax.fori_loop(0, turns, turn, carry)
        return carry

    def series(self, group: Int[Array, ""]) -> list[tuple[int, Array, Array]]:
        """(rows of a block, first row, number of blocks), a series after another, of a group: of each size as many as what the larger ones
        left fills, and one more if at most SPARE rows of it stay empty. Of the smallest as many as it takes."""
        row, stop, found = self.starts[group], self.stops[group], []
        for size in self.sizes:
            spare = size - 1 if size == self.sizes[-1] else min(SPARE, size - 1)
            turns = jnp.maximum(stop - row + spare, 0) // size
            found.append((size, row, turns))
            row = row + turns * size
        return found


def block_sizes(rows: int, groups: int) -> tuple[int, ...]:
    """Up to twice the mean rows of a group: larger ones would be compiled for few."""
    largest = min(2 * rows // max(1, groups), rows + SPARE)
    return tuple(size for size in LADDER if size <= largest) or LADDER[-1:]


def cut(groups: Groups, rows: int) -> Blocks:
    """The blocks of these groups, in a buffer of `rows` rows."""
    after = stops(groups)
    active = jnp.argsort(groups.sizes == 0, stable=True).astype(jnp.int32)
    number = jnp.sum(groups.sizes > 0, dtype=jnp.int32)
    return Blocks(active, number, after - groups.sizes, after, block_sizes(rows, groups.sizes.shape[0]))


def zeros(like: Array, *shape: int, dtype: jax.typing.DTypeLike | None = None) -> Array:
    """Zeros that vary over the same mesh axes as `like`, as a loop's carry inside shard_map must."""
    return jnp.zeros_like(like, shape=shape, dtype=dtype)


def unwritten(like: Array, *shape: int, dtype: jax.typing.DTypeLike | None = None) -> Array:
    """Memory for rows that the loop writes; the others are unspecified, and zeroing them would be a pass over all of it."""
    return collectives.vary_like(jax.lax.empty(shape, dtype or like.dtype), like)


def overhang(x: Array, size: int) -> Array:
    """The rows with `size` more behind them, so that a slice from any row stays inside."""
    return jnp.concatenate([x, zeros(x, size, *x.shape[1:])])


def rows_at(x: Array, block: Block) -> Array:
    return jax.lax.dynamic_slice_in_dim(x, block.row, block.size, axis=0)


def put_rows(x: Array, rows: Array, block: Block) -> Array:
    return jax.lax.dynamic_update_slice_in_dim(x, rows.astype(x.dtype), block.row, axis=0)


def put_group(w: Array, value: Array, group: Int[Array, ""]) -> Array:
    """w with its row `group` replaced; XLA does it in place inside a loop."""
    return jax.lax.dynamic_update_index_in_dim(w, value.astype(w.dtype), group, 0)
