"""Weights fetched ahead: those of the groups to come, while the rows of this one pass."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from moejax.kernels.grouped_matmul.pallas_tpu import work
from moejax.kernels.grouped_matmul.tiling import LANES, Tiles, ceil_to


@dataclasses.dataclass(frozen=True)
class Plan:
    """Sizes of one call."""

    rows: int
    columns: int
    tiles: Tiles
    cores: int
    share_rows: bool
    transposed: bool
    exact: bool
    """Arrays end where their shape says, as in the interpreter; on a chip they end on whole tiles, and copies must."""

    @property
    def passes(self) -> int:
        """Of all cores, over the rows."""
        return -(-self.columns // self.tiles.columns)

    @property
    def core_passes(self) -> int:
        return self.passes if self.share_rows else -(-self.passes // self.cores)

    def tile_of_columns(self, core: Any, turn: Any) -> Any:
        """The columns of a core's turn; past the last ones, the last once more."""
        if self.share_rows or self.cores == 1:
            return turn
        return jnp.minimum(core * self.core_passes + turn, self.passes - 1)


@dataclasses.dataclass(frozen=True)
class Fetch:
    """Weights on their way. A core's fetches are numbered: those of its first pass, one for each group in turn, then of the next."""

    plan: Plan
    items: work.Work
    weights: tuple[Any, ...]
    buffers: tuple[Any, ...]
    semaphores: Any
    core: Any

    @property
    def runs(self) -> tuple[Any, Any]:
        """First of the core's groups, and how many."""
        first, count = self.items.first[self.core], self.items.number[self.core]
        return self.items.run[first], self.items.run[first + count - 1] - self.items.run[first] + 1

    def place(self, turn: Any, run: Any) -> Any:
        first, count = self.runs
        return turn * count + run - first

    def advance(self, place: Any) -> None:
        """Waits for the weights of this place, and sends for those that the slot of the place before can take."""
        slots = self.plan.tiles.slots

        @pl.when(place == 0)
        def _() -> None:
            for ahead in range(slots - 1):
                self._start(ahead)

        self._start(place + slots - 1)
        self._each(place, lambda copy: copy.wait())

    def _start(self, place: Any) -> None:
        _, count = self.runs

        @pl.when(place < count * self.plan.core_passes)
        def _() -> None:
            self._each(place, lambda copy: copy.start())

    def _each(self, place: Any, act: Callable[[Any], None]) -> None:
        """The copies of a place; the last tile of columns may be narrower."""
        first, count = self.runs
        turn = place // count
        group, n = self.items.group[first + place - turn * count], self.plan.tile_of_columns(self.core, turn)
        whole, tail = self.plan.tiles.columns, self.plan.columns % self.plan.tiles.columns

        def copies(width: int) -> None:
            slot = place % self.plan.tiles.slots
            for i, (w, buffer) in enumerate(zip(self.weights, self.buffers, strict=True)):
                act(
                    pltpu.make_async_copy(
                        self._columns(w.at[group], n * whole, width),
                        self._columns(buffer.at[slot], 0, width),
                        self.semaphores.at[slot, i],
                    )
                )

        if tail == 0:
            return copies(whole)
        tail = tail if self.plan.exact else ceil_to(tail, LANES)
        pl.when(n < self.plan.passes - 1)(lambda: copies(whole))
        pl.when(n == self.plan.passes - 1)(lambda: copies(tail))

    def _columns(self, ref: Any, first: Any, width: int) -> Any:
        where = pl.ds(pl.multiple_of(first, LANES), width)
        return ref.at[where, :] if self.plan.transposed else ref.at[:, where]
