"""Transforms that pick, mix or change entries: copies, permutations and means of experts, factors and noise."""

from __future__ import annotations

import dataclasses
import zlib
from typing import Any

import numpy as np

from moejax.checkpoint.transforms import Goal, Parts, Transform, module_of, size_of


@dataclasses.dataclass(frozen=True)
class Select(Transform):
    """Entries of an axis by number, in a new order, some more than once, some not: of experts a permutation, copies, a choice.

    `index` has one row for all, or one for each entry of dimension 0 (a layer).
    """

    index: tuple[tuple[int, ...], ...]
    axis: int

    def array(self, x: Any) -> Any:
        """As many entries as a row of the index has."""
        _check_rows(self.index, x, self.axis, [i for row in self.index for i in row])
        if len(self.index) == 1:
            return module_of(x).take(x, np.array(self.index[0]), axis=self.axis)
        rows = np.array(self.index).reshape(len(self.index), *(-1 if d == self.axis else 1 for d in range(1, x.ndim)))
        return module_of(x).take_along_axis(x, rows, axis=self.axis)

    @property
    def inverse(self) -> Transform | None:
        """Of a permutation, the one that undoes it."""
        if any(sorted(row) != list(range(len(row))) for row in self.index):
            return None
        return Select(tuple(tuple(map(int, np.argsort(row))) for row in self.index), self.axis)


@dataclasses.dataclass(frozen=True)
class Mean(Transform):
    """Means of groups of entries of an axis; rows of groups as the rows of Select."""

    groups: tuple[tuple[tuple[int, ...], ...], ...]
    axis: int

    def array(self, x: Any) -> Any:
        """As many entries as there are groups."""
        _check_rows(self.groups, x, self.axis, [i for row in self.groups for group in row for i in group])
        xp = module_of(x)

        def of_row(y: Any, row: tuple[tuple[int, ...], ...], axis: int) -> Any:
            return xp.stack([xp.mean(xp.take(y, np.array(group), axis=axis), axis=axis) for group in row], axis=axis)

        if len(self.groups) == 1:
            return of_row(x, self.groups[0], self.axis).astype(x.dtype)
        rows = [of_row(y, row, self.axis - 1) for y, row in zip(x, self.groups, strict=True)]
        return xp.stack(rows).astype(x.dtype)


@dataclasses.dataclass(frozen=True)
class Tile(Transform):
    """All of an axis `copies` times over: a b -> a b a b."""

    axis: int
    copies: int

    def array(self, x: Any) -> Any:
        """A longer axis."""
        size_of(x, self.axis)
        return module_of(x).concatenate([x] * self.copies, axis=self.axis)


@dataclasses.dataclass(frozen=True)
class Scale(Transform):
    """Every entry times a factor."""

    factor: float

    def array(self, x: Any) -> Any:
        """In the array's own type; a factor of 1 changes no bit."""
        return x * module_of(x).asarray(self.factor, dtype=x.dtype)

    @property
    def inverse(self) -> Transform | None:
        """Divided, up to rounding."""
        return Scale(1 / self.factor) if self.factor else None


@dataclasses.dataclass(frozen=True)
class Noise(Transform):
    """Normal noise of `scale` times the array's own standard deviation. A pure function of the seed and the target's path."""

    scale: float
    seed: int

    def parts(self, parts: Parts, goal: Goal) -> Parts:
        """Every entry moved by its own draw."""
        rng = np.random.default_rng([self.seed, zlib.crc32(goal.path.encode())])
        return {key: self._moved(x, rng) for key, x in parts.items()}

    def _moved(self, x: Any, rng: np.random.Generator) -> Any:
        size = self.scale * float(np.std(np.asarray(x, np.float32)))
        return x + module_of(x).asarray(size * rng.standard_normal(x.shape), dtype=x.dtype)


def _check_rows(rows: tuple, x: Any, axis: int, used: list[int]) -> None:
    """Rows for all, or one for each entry of dimension 0, of equal length, of entries that are there."""
    size = size_of(x, axis)
    if len(rows) != 1 and (axis == 0 or len(rows) != x.shape[0]):
        raise ValueError(
            f"{len(rows)} rows of an index do not fit dimension 0 of {x.shape}; give one row, or one for each entry"
        )
    if len({len(row) for row in rows}) != 1 or not rows[0]:
        raise ValueError(
            f"rows of an index must be of one length above 0; these have {sorted({len(row) for row in rows})}"
        )
    if used and not 0 <= min(used) <= max(used) < size:
        raise ValueError(f"axis {axis} of {x.shape} has no entry {max(used) if max(used) >= size else min(used)}")
