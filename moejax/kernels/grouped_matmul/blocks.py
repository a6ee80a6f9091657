"""Cutting groups of contiguous rows into blocks, for loops of dynamic trip count.

A block is a fixed number of rows from the start of its group or of the block before. The last block of a group runs over into
the rows of the next group: what is written there is overwritten when that group's turn comes (blocks go in order),
and what is read there is masked where it would be summed.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from moejax.kernels.grouped_matmul.backend import Groups, stops

SMALLEST, LARGEST = 32, 256
"""Rows of a block: below, the cost of a turn of the loop shows; above, nothing is gained."""


class Blocks(NamedTuple):
    """The work list in closed form: which rows of which group the t-th block holds."""

    ends: Int[Array, " G"]
    """Blocks of this group and all before it."""
    starts: Int[Array, " G"]
    """First row of the group."""
    stops: Int[Array, " G"]
    """First row after the group."""
    size: int

    @property
    def total(self) -> Int[Array, ""]:
        return self.ends[-1]

    def locate(self, turn: Int[Array, ""]) -> tuple[Int[Array, ""], Int[Array, ""], Array]:
        """Group, first row, and which of the block's rows belong to the group, bool[size, 1]."""
        group = jnp.sum(turn >= self.ends, dtype=jnp.int32)
        before = jnp.where(group > 0, self.ends[jnp.maximum(group - 1, 0)], 0)
        row = self.starts[group] + (turn - before) * self.size
        mine = row + jnp.arange(self.size, dtype=jnp.int32) < self.stops[group]
        return group, row, mine[:, None]


def block_size(rows: int, groups: int) -> int:
    """About half the mean rows of a group, a power of two: a group wastes half a block on average."""
    half_mean = max(1, rows // (2 * groups))
    return min(LARGEST, max(SMALLEST, 1 << half_mean.bit_length() - 1))


def cut(groups: Groups, rows: int) -> Blocks:
    """The blocks of these groups, in a buffer of `rows` rows."""
    size = block_size(rows, groups.sizes.shape[0])
    after = stops(groups)
    return Blocks(jnp.cumsum(-(-groups.sizes // size), dtype=jnp.int32), after - groups.sizes, after, size)


def zeros(like: Array, *shape: int, dtype: jax.typing.DTypeLike | None = None) -> Array:
    """Zeros that vary over the same mesh axes as `like`, as a loop's carry inside shard_map must."""
    return jnp.zeros_like(like, shape=shape, dtype=dtype)


def overhang(x: Array, size: int) -> Array:
    """The rows with `size` more behind them, so that a slice from any row stays inside."""
    return jnp.concatenate([x, zeros(x, size, *x.shape[1:])])


def rows_at(x: Array, row: Int[Array, ""], size: int) -> Array:
    return jax.lax.dynamic_slice_in_dim(x, row, size, axis=0)


def put_rows(x: Array, rows: Array, row: Int[Array, ""]) -> Array:
    return jax.lax.dynamic_update_slice_in_dim(x, rows.astype(x.dtype), row, axis=0)


def add_to(w: Array, term: Array, group: Int[Array, ""]) -> Array:
    """w with `term` added to its row `group`; XLA does it in place inside a loop."""
    return jax.lax.dynamic_update_index_in_dim(w, w[group] + term, group, 0)
