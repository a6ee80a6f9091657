"""Which devices exchange, in the spellings of compiled programs, and the mesh axes that they lie along."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping

import numpy as np

LISTED = re.compile(r"replica_groups=\{(\{[\d,{}]*\})\}")
IOTA = re.compile(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
NAMED = re.compile(
    r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((?:\[([\d,]+)\]T\(([\d,]+)\)|([\d,]+))\))? \{([^}]*)\}"
)
SIZE = re.compile(r"'([^']+)'=(\d+)")
AXIS = re.compile(r"'([^']+)'(?::\((\d+)\)(\d+))?")
"""An axis, or a part of one: `'x':(2)4` are 4 places, of which 2 times as many as before them make blocks."""
ALL = re.compile(r"replica_groups=\{\}")
PAIRS = re.compile(r"source_target_pairs=\{([\d,{}]*)\}")


def axes_of(mesh: Mapping[str, int]) -> dict[tuple, tuple[str, ...]]:
    """Sets of device groups -> the mesh axes of more than one device that they lie along."""
    names = [axis for axis, size in mesh.items() if size > 1]
    grid = np.arange(math.prod(mesh.values())).reshape([mesh[axis] for axis in names] or [1])
    found = {}
    for number in range(len(names) + 1):
        for chosen in itertools.combinations(range(len(names)), number):
            moved = np.moveaxis(grid, chosen, range(grid.ndim - number, grid.ndim)) if chosen else grid[..., None]
            groups = moved.reshape(-1, math.prod(grid.shape[c] for c in chosen))
            found[key(groups.tolist())] = tuple(names[c] for c in chosen)
    return found


def partition(attributes: str) -> list[list[int]]:
    """Groups of devices that exchange; empty where all do. Raises ValueError for a spelling that is not known."""
    if named := NAMED.search(attributes):
        return _named(*named.groups())
    if iota := IOTA.search(attributes):
        return _spread(iota[3], iota[4]).reshape(int(iota[1]), int(iota[2])).tolist()
    if listed := LISTED.search(attributes):
        return [_numbers(group) for group in re.findall(r"\{([\d,]*)\}", listed[1])]
    if "replica_groups=" in attributes and not ALL.search(attributes):
        raise ValueError(
            f"groups of devices that cannot be read: {attributes[attributes.index('replica_groups=') :][:120]}"
        )
    return []


def permuted(attributes: str, mesh: Mapping[str, int]) -> tuple[str, ...]:
    """Axes along which any source differs from its target."""
    pairs = PAIRS.search(attributes)
    sizes = list(mesh.values())
    apart: set[str] = set()
    for pair in re.findall(r"\{(\d+),(\d+)\}", pairs[1] if pairs else ""):
        places = zip(*(np.unravel_index(int(device), sizes) for device in pair), strict=True)
        apart |= {axis for axis, (a, b) in zip(mesh, places, strict=True) if a != b}
    return tuple(axis for axis in mesh if axis in apart)


def key(groups: list[list[int]]) -> tuple:
    """Of groups, in whatever order they and their devices are."""
    return tuple(sorted(tuple(sorted(group)) for group in groups))


def _named(mesh: str, dims: str | None, order: str | None, listed: str | None, over: str) -> list[list[int]]:
    """Along axes, or parts of axes, of a mesh that the instruction spells out."""
    sizes = {name: int(size) for name, size in SIZE.findall(mesh)}
    taken = [(name, int(before or 1), int(size or sizes[name])) for name, before, size in AXIS.findall(over)]
    shape, chosen = [], []
    for name, whole in sizes.items():
        parts = [(before, before * size) for axis, before, size in taken if axis == name]
        cuts = sorted({1, whole, *itertools.chain(*parts)})
        for first, last in itertools.pairwise(cuts):
            chosen += [len(shape)] if any(low <= first and last <= high for low, high in parts) else []
            shape.append(last // first)
    ids = _spread(dims, order) if dims else np.array(_numbers(listed) if listed else range(math.prod(shape)))
    moved = np.moveaxis(ids.reshape(shape), chosen, range(len(shape) - len(chosen), len(shape)))
    return moved.reshape(-1, math.prod(shape[c] for c in chosen)).tolist()


def _spread(dims: str, order: str | None) -> np.ndarray:
    """Devices counted along dimensions, which are then put in another order."""
    grid = np.arange(math.prod(_numbers(dims))).reshape(_numbers(dims))
    return grid.transpose(_numbers(order)) if order else grid


def _numbers(text: str) -> list[int]:
    return [int(n) for n in text.split(",") if n]
