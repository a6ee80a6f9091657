"""Biases of a tile's columns: each consumer fetches its own at the tile's start and adds them when the contraction is done."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike

from moejax import compat
from moejax.kernels.grouped_matmul.pallas_gpu.tiles import CONSUMERS


class Slots(NamedTuple):
    """Where a tile's biases arrive, in each consumer's own part; for one consumer after `of`."""

    values: Any
    arrived: Any

    def of(self, warpgroup: jax.Array) -> Slots:
        return Slots(self.values.at[warpgroup], self.arrived.at[warpgroup])


def slots(count: int, columns: int, dtype: DTypeLike) -> Slots:
    """What a kernel allocates for `count` biases of a tile, 1 or 2."""
    return Slots(
        plgpu.SMEM((CONSUMERS, count, columns), dtype), plgpu.Barrier(num_arrivals=count, num_barriers=CONSUMERS)
    )


def fetch(biases: tuple[Any, ...], group: jax.Array, column: jax.Array, to: Slots) -> None:
    """Starts the transfer of each bias[group, column:]."""
    for number, bias in enumerate(biases):
        here = bias.at[group, pl.ds(column, to.values.shape[-1])]
        plgpu.copy_gmem_to_smem(here, to.values.at[number], to.arrived)


def add(part: jax.Array, slots: Slots, number: int, left: int, interpret: Any) -> jax.Array:
    """part, columns of a tile from its column `left`, plus their bias."""
    columns = slots.values.at[number, pl.ds(left, part.shape[1])]
    bias = compat.load_shared(columns, plgpu.Layout.WGMMA.reduce(0), interpret)
    return part + lax.broadcast_in_dim(bias.astype(part.dtype), part.shape, (1,))
