"""What a compiled program sends between devices: its collectives, over which mesh axes, how many bytes, how often."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np

from moejax.plan.hlo import Computation, Instruction, Module

KINDS = ("ragged-all-to-all", "all-to-all", "all-gather", "all-reduce", "reduce-scatter", "collective-permute")
LISTED = re.compile(r"replica_groups=\{(\{[\d,{}]*\})\}")
IOTA = re.compile(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
NAMED = re.compile(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}")
PAIRS = re.compile(r"source_target_pairs=\{([\d,{}]*)\}")
FUSED_REDUCE_SCATTER = "all-reduce-scatter"
"""How the TPU compiler may write a reduce-scatter: a fusion of this name whose body sums and cuts."""
UNKNOWN = ("?",)


class Sent(NamedTuple):
    """One collective."""

    kind: str
    axes: tuple[str, ...]
    """Mesh axes whose devices exchange; `?` where the groups are those of no set of axes."""
    devices: int
    """That exchange with one another."""
    dtype: str
    bytes: int
    """Of the larger of operand and result on one device, once."""
    times: int
    apart: bool
    """Started and finished by different instructions, with room for others in between."""
    scope: str
    """Of the operation in the traced program; empty for the compiler's own."""

    @property
    def wire(self) -> float:
        """Bytes that a device sends in all its runs, on a ring or directly: a part stays, and a sum goes round twice."""
        if self.kind == "collective-permute":
            return float(self.bytes * self.times)
        share = (self.devices - 1) / max(self.devices, 1)
        return (2 if self.kind == "all-reduce" else 1) * share * self.bytes * self.times


def of(module: Module, mesh: Mapping[str, int]) -> list[Sent]:
    """Every collective that the program runs, on a mesh of these sizes in the order of its devices. Those of one device are left out."""
    groups, found = axes_of(mesh), []
    for instruction, inside, times in module.runs:
        kind = instruction.opcode.removesuffix("-start")
        if kind not in KINDS or times == 0:
            continue
        if kind == "all-reduce" and inside.name.startswith(FUSED_REDUCE_SCATTER):
            kind = "reduce-scatter"
        members = partition(instruction.attributes) or [list(range(math.prod(mesh.values())))]
        size = len(members[0])
        axes = _permuted(instruction, mesh) if kind == "collective-permute" else groups.get(_key(members), UNKNOWN)
        if axes == ():
            continue
        shape, payload = _payload(instruction, inside)
        apart = instruction.opcode.endswith("-start")
        found.append(Sent(kind, axes, size, shape, payload, times, apart, instruction.scope))
    return found


def summed(sent: Iterable[Sent]) -> list[dict]:
    """One row for each kind and axes: `times`, `bytes`, `wire`, and `apart`, how many of `times` start and end apart."""
    rows: dict[tuple, dict] = {}
    for s in sent:
        row = rows.setdefault(
            (s.kind, s.axes), {"kind": s.kind, "axes": list(s.axes), "devices": s.devices, "times": 0, "apart": 0, "bytes": 0, "wire": 0.0}
        )  # fmt: skip
        row["times"] += s.times
        row["apart"] += s.times * s.apart
        row["bytes"] += s.bytes * s.times
        row["wire"] += s.wire
    return [rows[key] for key in sorted(rows)]


def axes_of(mesh: Mapping[str, int]) -> dict[tuple, tuple[str, ...]]:
    """Sets of device groups -> the mesh axes of more than one device that they lie along."""
    names = [axis for axis, size in mesh.items() if size > 1]
    grid = np.arange(math.prod(mesh.values())).reshape([mesh[axis] for axis in names] or [1])
    found = {}
    for number in range(len(names) + 1):
        for chosen in itertools.combinations(range(len(names)), number):
            moved = np.moveaxis(grid, chosen, range(grid.ndim - number, grid.ndim)) if chosen else grid[..., None]
            groups = moved.reshape(-1, math.prod(grid.shape[c] for c in chosen))
            found[_key(groups.tolist())] = tuple(names[c] for c in chosen)
    return found


def partition(attributes: str) -> list[list[int]]:
    """Groups of devices that exchange; empty where all do."""
    if named := NAMED.search(attributes):
        pairs = re.findall(r"'([^']+)'=(\d+)", named[1])
        names, sizes = [n for n, _ in pairs], [int(s) for _, s in pairs]
        over = [names.index(n) for n in re.findall(r"'([^']+)'", named[2])]
        grid = np.moveaxis(np.arange(math.prod(sizes)).reshape(sizes), over, range(len(sizes) - len(over), len(sizes)))
        return grid.reshape(-1, math.prod(sizes[o] for o in over)).tolist()
    if iota := IOTA.search(attributes):
        grid = np.arange(math.prod(_numbers(iota[3]))).reshape(_numbers(iota[3]))
        grid = grid.transpose(_numbers(iota[4])) if iota[4] else grid
        return grid.reshape(int(iota[1]), int(iota[2])).tolist()
    if listed := LISTED.search(attributes):
        return [_numbers(group) for group in re.findall(r"\{([\d,]*)\}", listed[1])]
    return []


def _permuted(instruction: Instruction, mesh: Mapping[str, int]) -> tuple[str, ...]:
    """Axes along which any source differs from its target."""
    pairs = PAIRS.search(instruction.attributes)
    sizes = list(mesh.values())
    apart: set[str] = set()
    for pair in re.findall(r"\{(\d+),(\d+)\}", pairs[1] if pairs else ""):
        places = zip(*(np.unravel_index(int(device), sizes) for device in pair), strict=True)
        apart |= {axis for axis, (a, b) in zip(mesh, places, strict=True) if a != b}
    return tuple(axis for axis in mesh if axis in apart)


def _payload(instruction: Instruction, inside: Computation) -> tuple[str, int]:
    """Type of the first operand, and bytes of the larger of operand and result. A ragged exchange also takes where rows go."""
    operands = [s for o in instruction.operands for s in inside.instructions[o].shapes]
    given = operands[:1] if instruction.opcode.startswith("ragged") else operands
    sent = sum(s.bytes for s in given)
    made = sum(s.bytes for s in instruction.shapes) - (sent if instruction.opcode.endswith("-start") else 0)
    if instruction.opcode.startswith("ragged"):
        return given[0].dtype, sent
    return (operands or instruction.shapes)[0].dtype, max(sent, made)


def _key(groups: list[list[int]]) -> tuple:
    return tuple(sorted(tuple(sorted(group)) for group in groups))


def _numbers(text: str) -> list[int]:
    return [int(n) for n in text.split(",") if n]
