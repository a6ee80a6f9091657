"""A compiled program as its text says it: computations, instructions, and how often each runs.

The text is of one device. A loop's body runs as often as its condition says. Where the bound is not in the text the loop is listed as open
and counts no turn: it is one of further rounds of an exchange, of which there are none while routing fits the buffer. Every branch of a
conditional counts.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

HEADER = re.compile(r"^(ENTRY )?%?(\S+) \(.*\{$")
NAME = re.compile(r"^  (ROOT )?%?(\S+) = ")
ARRAY = re.compile(r"([a-z]\w*)\[([\d,]*)\]")
OPERAND = re.compile(r"%([^\s,(){}]+)")
CALLED = re.compile(
    r"(?:calls|to_apply|called_computations|branch_computations|true_computation|false_computation)=(\{[^}]*\}|%[^\s,]+)"
)
LOOP = re.compile(r"condition=%([^\s,]+), body=%([^\s,]+)")
TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
WRAPPED = re.compile(r'\n(?="|\}, ")')
"""Where an instruction goes on in the next line: what the compiler notes of a kernel inside a fusion."""
INDEX = re.compile(r"index=(\d+)")
DIRECTION = re.compile(r"direction=(\w+)")
LIMIT = {"LT": 1, "GT": 0}
"""Which side of a comparison has the limit of a loop that counts up."""
SCOPE = re.compile(r'op_name="([^"]*)"')
BITS = re.compile(r"\d+")
LITERAL = ("constant", "parameter")
"""Instructions whose only operand is a number: its value, or which of the computation's it is."""


class Shape(NamedTuple):
    """An array on one device."""

    dtype: str
    """As the compiler writes it: f32, bf16, s32, pred."""
    dims: tuple[int, ...]

    @property
    def bytes(self) -> int:
        bits = BITS.search(self.dtype)
        return -(-math.prod(self.dims) * (int(bits[0]) if bits else 8) // 8)


class Instruction(NamedTuple):
    """A line of a computation."""

    name: str
    shapes: tuple[Shape, ...]
    """Of every array of the result."""
    opcode: str
    operands: tuple[str, ...]
    attributes: str
    """The rest of the line."""
    root: bool

    @property
    def scope(self) -> str:
        """The operation in the traced program; empty for the compiler's own."""
        found = SCOPE.search(self.attributes)
        return found[1] if found else ""


class Computation(NamedTuple):
    """The program, or a function, loop body or fusion of it."""

    name: str
    instructions: dict[str, Instruction]

    @property
    def root(self) -> Instruction:
        return next(i for i in self.instructions.values() if i.root)


class Run(NamedTuple):
    """An instruction, and how often the program runs it."""

    instruction: Instruction
    inside: Computation
    times: int


class Module:
    """A parsed program."""

    def __init__(self, text: str) -> None:
        self.computations: dict[str, Computation] = {}
        self.entry = ""
        self.open_loops: list[str] = []
        """Scopes of loops whose bound the text does not have."""
        inside: Computation | None = None
        for line in WRAPPED.sub("", text).splitlines():
            if inside is None:
                if header := HEADER.match(line):
                    inside = self.computations.setdefault(header[2], Computation(header[2], {}))
                    self.entry = header[2] if header[1] else self.entry
            elif line.startswith("}"):
                inside = None
            elif (found := parsed(line)) is not None:
                inside.instructions[found.name] = found

    @functools.cached_property
    def runs(self) -> list[Run]:
        """Every instruction that the program runs, those inside fusions and loops too."""
        return list(self._walk(self.entry, 1))

    def _walk(self, name: str, times: int) -> Iterator[Run]:
        inside = self.computations[name]
        for instruction in inside.instructions.values():
            yield Run(instruction, inside, times)
            if instruction.opcode.endswith(("-done", "-update")):
                continue
            if loop := LOOP.search(instruction.attributes):
                yield from self._walk(loop[2], times * self._trips(instruction, inside, loop[1]))
            for called in CALLED.findall(instruction.attributes):
                for child in OPERAND.findall(called):
                    yield from self._walk(child, times)

    def _trips(self, loop: Instruction, inside: Computation, condition: str) -> int:
        """Turns of a loop that counts up by 1, as scans do: from 0, or from 1 where the compiler took the first turn out."""
        if known := TRIPS.search(loop.attributes):
            return int(known[1])
        found = self._bound(self.computations[condition])
        if found is None:
            self.open_loops.append(loop.scope)
            return 0
        bound, counter = found
        return bound - self._first(loop, inside, counter)

    def _bound(self, condition: Computation) -> tuple[int, Instruction] | None:
        """n and i of `i < n`, where n is a constant; the comparison may stand in a fusion, which takes i and n or has n inside."""
        test, given = condition.root, condition.instructions
        if test.opcode == "fusion":
            outer, inner = test, self.computations[OPERAND.findall(CALLED.findall(test.attributes)[0])[0]]
            test, given = inner.root, dict(inner.instructions)
            for name, own in inner.instructions.items():
                if own.opcode == "parameter":
                    given[name] = condition.instructions[outer.operands[int(own.operands[0])]]
        direction = DIRECTION.search(test.attributes)
        if test.opcode != "compare" or direction is None or direction[1] not in LIMIT:
            return None
        side = LIMIT[direction[1]]
        limit, counter = given[test.operands[side]], given[test.operands[1 - side]]
        return (int(limit.operands[0]), counter) if limit.opcode == "constant" else None

    def _first(self, loop: Instruction, inside: Computation, counter: Instruction) -> int:
        """What a loop counts from; 0 where its state does not say."""
        place, state = INDEX.search(counter.attributes), inside.instructions[loop.operands[0]]
        if place is None or state.opcode != "tuple":
            return 0
        begun = inside.instructions[state.operands[int(place[1])]]
        while begun.opcode == "copy":
            begun = inside.instructions[begun.operands[0]]
        return int(begun.operands[0]) if begun.opcode == "constant" else 0


def parsed(line: str) -> Instruction | None:
    """One line of a computation; None for what is no instruction."""
    name = NAME.match(line)
    if name is None:
        return None
    rest = line[name.end() :]
    cut = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    opcode, _, _ = rest[cut:].lstrip().partition("(")
    start = rest.index("(", cut)
    end = _closing(rest, start)
    shapes = tuple(Shape(t, tuple(int(n) for n in dims.split(",") if n)) for t, dims in ARRAY.findall(rest[:cut]))
    inner = rest[start : end + 1]
    operands = tuple(OPERAND.findall(inner)) or ((inner[1:-1],) if opcode in LITERAL else ())
    return Instruction(name[2], shapes, opcode, operands, rest[end + 1 :], bool(name[1]))


def _closing(text: str, start: int) -> int:
    """Where the parenthesis that opens at `start` closes."""
    depth = 0
    for place in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[place], 0)
        if depth == 0:
            return place
    raise ValueError(f"a parenthesis of {text[:80]!r} does not close")
