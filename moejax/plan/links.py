"""How mesh axes lie on the links of a slice, and how long a collective takes on what an axis gets of them.

Formulas are those of collectives that bandwidth bounds in "How to Scale Your Model" (Austin et al. 2025), part 3: an all-gather or a
reduce-scatter is limited by what a device sends into its links, an all-to-all by the links that cross the middle of a ring. Hops cost
nothing.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from moejax import mesh as meshes
from moejax.errors import ConfigError
from moejax.plan.hardware import Topology

EXCHANGES = ("all-to-all", "ragged-all-to-all")
"""Collectives in which every device has something else for every other."""
UNKNOWN = "?"
"""An axis that a compiled program does not name."""


class Piece(NamedTuple):
    """Part of a dimension of the torus that a mesh axis lies along."""

    size: int
    bandwidth: float
    """Bytes/s that a device sends along it: both ways where it is a ring, shared with devices that lie between."""


class Wiring(NamedTuple):
    """A mesh on one slice or several."""

    topology: Topology
    slices: int
    pieces: dict[str, tuple[Piece, ...]]
    """Of every mesh axis, as far as it lies within a slice; none for an axis of one device."""


def lay(topology: Topology, sizes: Mapping[str, int], slices: int = 1) -> Wiring | None:
    """Mesh axes on the torus as jax lays them (`mesh_utils.create_device_mesh`): the last axis first, each on the most whole dimensions
    whose product it is. None where that fails and the chip's meshes do not cut dimensions; those of several slices may (moejax.mesh).

    Raises ConfigError where the mesh has another number of devices, or the axis across slices is no multiple of them.
    """
    inside = dict(sizes)
    if inside[meshes.ACROSS] % slices or math.prod(sizes.values()) != topology.devices * slices:
        named = " * ".join(f"{axis}={size}" for axis, size in sizes.items() if size > 1) or "1"
        raise ConfigError(
            f"mesh {named} on {slices} slice(s) of {topology.name} with {topology.devices} devices each: the product must be "
            f"{topology.devices * slices}, and mesh.{meshes.ACROSS} a multiple of the slices"
        )
    inside[meshes.ACROSS] //= slices
    found = _whole(topology, inside)
    if found is None and (topology.chip.split or slices > 1 or not topology.chip.torus):
        found = _cut(topology, inside)
    return None if found is None else Wiring(topology, slices, found)


def seconds(row: Mapping[str, Any], wiring: Wiring) -> tuple[float, float]:
    """Seconds that a row of collectives takes on links within a slice, and on the network between slices.

    `row` has `kind`, `axes`, `devices` and `wire`, bytes that a device sends, as in `plan.sends.summed`. Of a compiled program a row also
    says in `network` whether it is between slices. Any other that crosses slices is taken to be done in two stages: within each slice, then
    a share of it between slices. Devices whose axes are not known get one link.
    """
    if row.get("network"):
        return 0.0, row["wire"] / wiring.topology.chip.network
    if UNKNOWN in row["axes"]:
        return row["wire"] / wiring.topology.chip.link, 0.0
    inside = _within(row, wiring)
    if wiring.slices == 1 or meshes.ACROSS not in row["axes"] or "network" in row:
        return inside, 0.0
    return inside, _between(row, wiring.slices) / wiring.topology.chip.network


def _within(row: Mapping[str, Any], wiring: Wiring) -> float:
    """Seconds on the links of a slice."""
    pieces = [piece for axis in row["axes"] for piece in wiring.pieces[axis]]
    devices = math.prod(piece.size for piece in pieces)
    if devices == 1:
        return 0.0
    if row["kind"] == "collective-permute":
        return row["wire"] / max(piece.bandwidth for piece in pieces)
    whole = row["wire"] * row["devices"] / (row["devices"] - 1)
    if row["kind"] in EXCHANGES and wiring.topology.chip.torus:
        # Half of what each of n devices has crosses the middle of a ring that w bytes/s pass each way: n whole / 4 over w.
        return max(piece.size * whole / (4 * piece.bandwidth) for piece in pieces)
    return whole * (devices - 1) / devices / sum(piece.bandwidth for piece in pieces)


def _between(row: Mapping[str, Any], slices: int) -> float:
    """Bytes that a device sends to other slices. Of what is gathered or summed, each device of a slice carries a share."""
    if row["kind"] == "collective-permute":
        return row["wire"]
    whole = row["wire"] * row["devices"] / (row["devices"] - 1) * (slices - 1) / slices
    return whole if row["kind"] in EXCHANGES else whole * slices / row["devices"]


def _whole(topology: Topology, sizes: Mapping[str, int]) -> dict[str, tuple[Piece, ...]] | None:
    """Every axis on whole dimensions."""
    free = [d for d, n in enumerate(topology.grid) if n > 1]
    found: dict[str, tuple[Piece, ...]] = {}
    for axis, size in reversed(list(sizes.items())):
        taken = _first(topology.grid, free, size) if size > 1 else ()
        if taken is None:
            return None
        found[axis] = tuple(_piece(topology, d, topology.grid[d], 1) for d in taken)
        free = [d for d in free if d not in taken]
    return found


def _first(grid: Sequence[int], free: Sequence[int], size: int) -> tuple[int, ...] | None:
    """The most dimensions whose product is this size, first ones first."""
    for number in range(len(free), 0, -1):
        for chosen in itertools.combinations(free, number):
            if math.prod(grid[d] for d in chosen) == size:
                return chosen
    return None


def _cut(topology: Topology, sizes: Mapping[str, int]) -> dict[str, tuple[Piece, ...]] | None:
    """Axes on parts of dimensions, the last axis innermost."""
    rest, found = list(topology.grid), {}
    for axis, size in reversed(list(sizes.items())):
        pieces = []
        whole = _first(rest, [d for d, n in enumerate(rest) if n > 1], size) or ()
        for d in (*whole, *sorted(range(len(rest)), key=lambda d: -rest[d])):
            part = math.gcd(size, rest[d])
            if part > 1:
                pieces.append(_piece(topology, d, part, topology.grid[d] // rest[d]))
                size, rest[d] = size // part, rest[d] // part
        if size > 1:
            return None
        found[axis] = tuple(pieces)
    return found


def _piece(topology: Topology, dim: int, size: int, between: int) -> Piece:
    """`size` devices along a dimension, each `between` places from the next, so that as many groups share the links."""
    chip, length = topology.chip, topology.grid[dim]
    if not chip.torus:
        return Piece(size, chip.link)
    if dim == len(topology.dims):
        return Piece(size, chip.inside)
    ways = 2 if topology.wraps(dim) and size * between == length else 1
    return Piece(size, ways * chip.link / between)
