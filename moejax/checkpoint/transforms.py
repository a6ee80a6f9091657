"""What a rule does to arrays: small pure functions on NumPy or JAX arrays, each with its inverse where it has one.

Stack and Unstack go between leaves and a dimension, by a field of the rule's patterns (paths.py); all others change one array. Here is
what moves entries about; what picks, mixes or changes them is in entries.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

Array = np.ndarray | jax.Array
Key = tuple[tuple[str, int], ...]
"""Places of the fields that tell the leaves of one target apart; empty for a single array."""
Parts = dict[Key, Any]


class Goal(NamedTuple):
    """The target leaf that is being made."""

    path: str
    places: Mapping[str, tuple[int, int]]
    """Of every field that only targets have: this leaf's place, and how many places there are."""


@dataclasses.dataclass(frozen=True)
class Transform:
    """One step of a rule. Arrays that do not fit raise ValueError."""

    def array(self, x: Any) -> Any:
        """What becomes of one array."""
        raise NotImplementedError

    def parts(self, parts: Parts, goal: Goal) -> Parts:
        """What becomes of all arrays that a target is made of."""
        return {key: self.array(x) for key, x in parts.items()}

    @property
    def inverse(self) -> Transform | None:
        """The transform that undoes this one; None where there is none."""
        return None

    @property
    def by_rows(self) -> bool:
        """Whether entry i of dimension 0 of the result is made of entry i of the array's alone."""
        return False


@dataclasses.dataclass(frozen=True)
class Stack(Transform):
    """The leaves of a field, in order of its places, along a new axis."""

    field: str
    axis: int

    def parts(self, parts: Parts, goal: Goal) -> Parts:
        """One array for each combination of the other fields."""
        found: dict[Key, dict[int, Array]] = {}
        for key, x in parts.items():
            rest = tuple(pair for pair in key if pair[0] != self.field)
            found.setdefault(rest, {})[dict(key)[self.field]] = x
        return {rest: _stacked([xs[i] for i in sorted(xs)], self.axis) for rest, xs in found.items()}

    @property
    def inverse(self) -> Transform:
        """The way back to leaves."""
        return Unstack(self.field, self.axis)


@dataclasses.dataclass(frozen=True)
class Unstack(Transform):
    """Of an axis the entry at the target's place of a field. The targets together take the whole axis."""

    field: str
    axis: int

    def parts(self, parts: Parts, goal: Goal) -> Parts:
        """Each array without the axis."""
        place, number = goal.places[self.field]
        for x in parts.values():
            if size_of(x, self.axis) != number:
                raise ValueError(
                    f"axis {self.axis} of {x.shape} has not one entry for each of the {number} {{{self.field}}}"
                )
        return {key: x[(slice(None),) * self.axis + (place,)] for key, x in parts.items()}

    @property
    def inverse(self) -> Transform:
        """The way back to one array."""
        return Stack(self.field, self.axis)

    @property
    def by_rows(self) -> bool:
        """The axis taken is another one."""
        return self.axis > 0


@dataclasses.dataclass(frozen=True)
class Split(Transform):
    """An axis cut into equal parts, which become a new axis at `to` of the result."""

    axis: int
    number: int
    to: int

    def array(self, x: Any) -> Any:
        """One more dimension."""
        size = size_of(x, self.axis)
        if size % self.number:
            raise ValueError(f"axis {self.axis} of {x.shape} cannot be cut into {self.number} equal parts")
        cut = x.reshape(*x.shape[: self.axis], self.number, size // self.number, *x.shape[self.axis + 1 :])
        return module_of(x).moveaxis(cut, self.axis, self.to)

    @property
    def inverse(self) -> Transform:
        """The parts joined."""
        return Join(self.axis, self.number, self.to)

    @property
    def by_rows(self) -> bool:
        """Another axis is cut, and its parts go elsewhere."""
        return self.axis > 0 and self.to > 0


@dataclasses.dataclass(frozen=True)
class Join(Transform):
    """The inverse of Split: the axis `to`, of `number` entries, as the outer part of what is then `axis`."""

    axis: int
    number: int
    to: int

    def array(self, x: Any) -> Any:
        """One dimension less."""
        if size_of(x, self.to) != self.number:
            raise ValueError(f"axis {self.to} of {x.shape} has not {self.number} entries")
        y = module_of(x).moveaxis(x, self.to, self.axis)
        return y.reshape(*y.shape[: self.axis], -1, *y.shape[self.axis + 2 :])

    @property
    def inverse(self) -> Transform:
        """The axis cut again."""
        return Split(self.axis, self.number, self.to)


@dataclasses.dataclass(frozen=True)
class Resize(Transform):
    """An axis of `before` entries cut, or filled up with `fill`, to `after`: a vocabulary, for example."""

    axis: int
    before: int
    after: int
    fill: float = 0.0

    def array(self, x: Any) -> Any:
        """Another length."""
        if size_of(x, self.axis) != self.before:
            raise ValueError(f"axis {self.axis} of {x.shape} has not {self.before} entries")
        kept = x[(slice(None),) * self.axis + (slice(self.after),)]
        new = (*x.shape[: self.axis], max(self.after - self.before, 0), *x.shape[self.axis + 1 :])
        return module_of(x).concatenate([kept, module_of(x).full(new, self.fill, x.dtype)], axis=self.axis)

    @property
    def inverse(self) -> Transform | None:
        """What was filled up is cut; what was cut is lost."""
        return Resize(self.axis, self.after, self.before) if self.after >= self.before else None


@dataclasses.dataclass(frozen=True)
class Transpose(Transform):
    """Dimensions in another order."""

    axes: tuple[int, ...]

    def array(self, x: Any) -> Any:
        """Dimension i of the result is axes[i] of x."""
        if len(self.axes) != x.ndim:
            raise ValueError(f"an array of shape {x.shape} has not the {len(self.axes)} dimensions of {self.axes}")
        return module_of(x).transpose(x, self.axes)

    @property
    def inverse(self) -> Transform:
        """The order before."""
        return Transpose(tuple(map(int, np.argsort(self.axes))))


def module_of(x: Any) -> Any:
    """numpy or jax.numpy, as the array is one's or the other's."""
    return np if isinstance(x, np.ndarray) else jax.numpy


def _stacked(xs: list[Any], axis: int) -> Any:
    if len({x.shape for x in xs}) > 1:
        raise ValueError(f"leaves of different shapes cannot be stacked: {sorted({x.shape for x in xs})}")
    return module_of(xs[0]).stack(xs, axis=axis)


def size_of(x: Any, axis: int) -> int:
    if not 0 <= axis < x.ndim:
        raise ValueError(f"an array of shape {x.shape} has no axis {axis}")
    return x.shape[axis]
