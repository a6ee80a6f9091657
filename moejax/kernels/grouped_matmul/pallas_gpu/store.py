"""Results on their way from registers to memory: exactly the rows of the tile's own group, and no column past the last."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike

from moejax.kernels.grouped_matmul.pallas_gpu.tiles import CONSUMERS, SLOTS, SWIZZLE, WARPGROUP_ROWS, piece


def staging(dtype: DTypeLike) -> Any:
    """Shared memory between: for each consumer SLOTS pieces of 64 rows of 128 bytes.

    Tiles of one row have the bytes of tiles of eight, and a store may begin at any of them: TMA swizzles by address.
    """
    columns = piece(dtype)
    rows = plgpu.TilingTransform((1, columns)), plgpu.SwizzleTransform(SWIZZLE)
    return plgpu.SMEM((CONSUMERS, SLOTS, WARPGROUP_ROWS, columns), dtype, transforms=rows)


def begin() -> None:
    """Waits until the pieces of the tile before have left their slots: they have had a whole contraction for it."""
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)


class Target(NamedTuple):
    """Where a consumer's 64 rows of a tile go: those of [skip, skip + rows) to y[row + skip:]."""

    y: Any
    row: jax.Array
    skip: jax.Array
    rows: jax.Array


def target(y: Any, row: jax.Array, first: jax.Array, stop: jax.Array) -> Target:
    """For a consumer's rows that begin at `row`, of which those from `first` to `stop` are wanted."""
    skip, end = (lax.clamp(0, bound - row, WARPGROUP_ROWS) for bound in (first, stop))
    return Target(y, row, skip, end - skip)


def put(slots: Any, number: int, values: jax.Array, to: Target, column: jax.Array) -> None:
    """The number-th piece of a tile, its columns to those of y from `column`.

    The size of a transfer is fixed in its descriptor, so that a number of rows is stored as its binary digits, the largest first.
    Columns past the last are left out by TMA.
    """
    slot = slots.at[number % SLOTS]
    if number >= SLOTS:
        plgpu.wait_smem_to_gmem(SLOTS - 1, wait_read_only=True)
    slot[...] = values
    plgpu.commit_smem()
    size = WARPGROUP_ROWS
    while size:

        @pl.when((to.rows & size) != 0)
        def _(size: int = size) -> None:
            begin = to.skip + (to.rows & ~(2 * size - 1))
            there = to.y.at[pl.ds(to.row + begin, size), pl.ds(column, values.shape[1])]
            plgpu.copy_smem_to_gmem(slot.at[pl.ds(begin, size)], there, commit_group=False)

        size //= 2
    plgpu.commit_smem_to_gmem_group()


def end() -> None:
    """Before the kernel ends: everything has arrived."""
    plgpu.wait_smem_to_gmem(0)
