"""What a compiled program sends between devices: its collectives, over which mesh axes, how many bytes, how often."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from moejax.plan import groups
from moejax.plan.hlo import Computation, Instruction, Module, Shape

KINDS = ("ragged-all-to-all", "all-to-all", "all-gather", "all-reduce", "reduce-scatter", "collective-permute")
FUSED_REDUCE_SCATTER = "all-reduce-scatter"
"""How the TPU compiler may write a reduce-scatter: a fusion of this name whose body sums and cuts."""
UNKNOWN = ("?",)
CONTEXT = Shape("u32", ())
"""What the compiler keeps of a collective that has started, among its results."""


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
    known, found = groups.axes_of(mesh), []
    for instruction, inside, times in module.runs:
        kind = instruction.opcode.removesuffix("-start")
        if kind not in KINDS or times == 0:
            continue
        if kind == "all-reduce" and inside.name.startswith(FUSED_REDUCE_SCATTER):
            kind = "reduce-scatter"
        if kind == "collective-permute":
            size, axes = math.prod(mesh.values()), groups.permuted(instruction.attributes, mesh)
        else:
            members = groups.partition(instruction.attributes) or [list(range(math.prod(mesh.values())))]
            size, axes = len(members[0]), known.get(groups.key(members), UNKNOWN)
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


def _payload(instruction: Instruction, inside: Computation) -> tuple[str, int]:
    """Type of the first operand, and bytes of the larger of operand and result. A ragged exchange also takes where rows go."""
    operands = [s for o in instruction.operands for s in inside.instructions[o].shapes]
    if instruction.opcode.startswith("ragged"):
        return operands[0].dtype, operands[0].bytes
    sent, results = sum(s.bytes for s in operands), instruction.shapes
    made = sum(s.bytes for s in results)
    if instruction.opcode.endswith("-start"):  # results have the operands among them
        made = sum(s.bytes for s in results if s != CONTEXT) - sent
    return operands[0].dtype, max(sent, made)
