"""What a compiled program sends between devices: its collectives, over which mesh axes, how many bytes, how often.

The program of several slices is that of one: its collectives stay within the slice and count its devices alone. Between slices it sends
through the host, by instructions that say to whom and what for.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from moejax import mesh as meshes
from moejax.plan import groups
from moejax.plan.hlo import Computation, Instruction, Module, Run, Shape

KINDS = ("ragged-all-to-all", "all-to-all", "all-gather", "all-reduce", "reduce-scatter", "collective-permute")
FUSED_REDUCE_SCATTER = "all-reduce-scatter"
"""How the TPU compiler may write a reduce-scatter: a fusion of this name whose body sums and cuts."""
CHAINED = 'chain_id="'
STARTS = '"AsyncCollectiveStart"'
"""A collective in a chain of fusions, which go on with it beside their own work: it is named in all of them, and begins in one."""
UNKNOWN = ("?",)
NETWORK = re.compile(r'_xla_megascale_transfer_type="(\w+)"')
"""What a send to other slices is a part of."""
SLICES = re.compile(r'_xla_megascale_target="\{([\d,]+)\}x')
"""The slices that take part in it; which devices of theirs follows."""
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
    network: bool = False
    """Between slices, and nothing of it within one."""

    @property
    def wire(self) -> float:
        """Bytes that a device sends in all its runs, on a ring or directly: a part stays, and a sum goes round twice."""
        if self.kind == "collective-permute":
            return float(self.bytes * self.times)
        share = (self.devices - 1) / max(self.devices, 1)
        return (2 if self.kind == "all-reduce" else 1) * share * self.bytes * self.times


def of(module: Module, mesh: Mapping[str, int], slices: int = 1) -> list[Sent]:
    """Every collective that the program runs, on a mesh of these sizes in the order of its devices. Those of one device are left out.

    Args:
      slices: that the mesh lies on, each with consecutive parts of the axis across them.
    """
    inside = dict(mesh)
    if slices > 1:
        inside[meshes.ACROSS] //= slices
    known, found = groups.axes_of(inside), []
    for run in module.runs:
        if run.times == 0:
            continue
        if run.instruction.opcode == "send":
            found += _between(run, slices)
        elif (kind := run.instruction.opcode.removesuffix("-start")) in KINDS:
            found += _within(run, kind, inside, known)
    return found


def _within(run: Run, kind: str, mesh: Mapping[str, int], known: Mapping[tuple, tuple[str, ...]]) -> list[Sent]:
    """A collective of one slice; none of one device, or where one goes on that began before."""
    instruction, inside, times = run
    chained = CHAINED in instruction.attributes
    if chained and not any(STARTS in i.attributes for i in inside.instructions.values()):
        return []
    if kind == "all-reduce" and inside.name.startswith(FUSED_REDUCE_SCATTER):
        kind = "reduce-scatter"
    if kind == "collective-permute":
        size, axes = math.prod(mesh.values()), groups.permuted(instruction.attributes, mesh)
    else:
        members = groups.partition(instruction.attributes) or [list(range(math.prod(mesh.values())))]
        size, axes = len(members[0]), known.get(groups.key(members), UNKNOWN)
    if axes == ():
        return []
    dtype, payload = _payload(instruction, inside)
    apart = chained or instruction.opcode.endswith("-start")
    return [Sent(kind, axes, size, dtype, payload, times, apart, instruction.scope)]


def _between(run: Run, slices: int) -> list[Sent]:
    """A send to other slices, as the collective that it is a part of; none where it is to the host alone."""
    instruction, inside, times = run
    if (found := NETWORK.search(instruction.attributes)) is None:
        return []
    kind, named = found[1].lower().replace("_", "-"), SLICES.search(instruction.attributes)
    size = len(named[1].split(",")) if named else slices
    (operand,) = inside.instructions[instruction.operands[0]].shapes
    whole = operand.bytes * (size if kind == "all-gather" else 1)
    return [Sent(kind, (meshes.ACROSS,), size, operand.dtype, whole, times, True, instruction.scope, network=True)]


def summed(sent: Iterable[Sent]) -> list[dict]:
    """One row for each kind and axes, apart for those between slices: `times`, `bytes`, `wire`, and `apart`, how many of `times` start and
    end apart."""
    rows: dict[tuple, dict] = {}
    for s in sent:
        row = rows.setdefault(
            (s.kind, s.axes, s.network), {
                "kind": s.kind, "axes": list(s.axes), "network": s.network, "devices": s.devices,
                "times": 0, "apart": 0, "bytes": 0, "wire": 0.0,
            }
        )  # fmt: skip
        row["times"] += s.times
        row["apart"] += s.times * s.apart
        row["bytes"] += s.bytes * s.times
        row["wire"] += s.wire
    return [rows[key] for key in sorted(rows)]


def named(row: Mapping[str, Any]) -> str:
    """The axes of a row of `summed`, for people: `fsdp+expert`, `data (network)`."""
    return "+".join(row["axes"]) + (" (network)" if row.get("network") else "")


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
