"""What a compiled program sends: its collectives, read off its text."""

from __future__ import annotations

import math
import re
from typing import NamedTuple

KINDS = ("ragged-all-to-all", "all-to-all", "all-gather", "all-reduce", "reduce-scatter", "collective-permute")
LINE = re.compile(rf"^ *(?:ROOT )?%\S+ = (.*?) ({'|'.join(KINDS)})(?:-start)?\(.*", re.MULTILINE)
START = re.compile(rf" *%(\S+) = .*? ({'|'.join(KINDS)})-start\(")
DONE = re.compile(rf" *%\S+ = .*? (?:{'|'.join(KINDS)})-done\((?:.*? )?%([^\s),]+)\)")
ARRAY = re.compile(r"(\w+)\[([\d,]*)\]")
FUSION_BODY = re.compile(r"^%all-reduce-scatter\S* .*?^}$", re.MULTILINE | re.DOTALL)
FUSED = re.compile(r"^( *%\S+) = (\S+) fusion\((?=.*calls=%all-reduce-scatter)", re.MULTILINE)
"""How the TPU compiler may write a reduce-scatter: a fusion whose body sums and cuts."""
NAME = re.compile(r'op_name="([^"]*)"')
GROUPS = re.compile(
    r"replica_groups=(?:\{\{(?P<first>[\d,]+)\}|\[\d+,(?P<each>\d+)\]<=|mesh\[(?P<sizes>[^\]]*)\] \{(?P<axes>[^}]*)\})"
)
BITS = re.compile(r"\d+")


class Collective(NamedTuple):
    kind: str
    dtype: str
    """Of the first array, as the compiler writes it: f32, bf16, s32."""
    shapes: tuple[tuple[int, ...], ...]
    """Of every array of the result, on one device."""
    bytes: int
    """Of the result on one device; of operand and result where the operation is started apart."""
    name: str
    """Of the operation in the program; empty for the compiler's own."""
    devices: int
    """That exchange with one another; 0 where the program does not say."""


def of(text: str) -> list[Collective]:
    """Every collective of a program, once however often a loop turns."""
    found = []
    for line in LINE.finditer(FUSED.sub(r"\1 = \2 reduce-scatter(", FUSION_BODY.sub("", text))):
        arrays = ARRAY.findall(line[1])
        shapes = tuple(tuple(int(n) for n in dims.split(",") if n) for _, dims in arrays)
        size = sum(_bits(dtype) * math.prod(shape) // 8 for (dtype, _), shape in zip(arrays, shapes, strict=True))
        found.append(Collective(line[2], arrays[0][0], shapes, size, _name(line[0]), _devices(line[0])))
    return found


class Span(NamedTuple):
    """A collective that starts and ends apart."""

    kind: str
    name: str
    """Of the operation in the program."""
    under: tuple[str, ...]
    """Matrix products that the compiler has put between start and end, by their names in the program."""


def spans(text: str) -> list[Span]:
    """Every collective of a scheduled program that starts and ends apart, in the order in which they end."""
    found, open_ = [], {}
    for line in text.splitlines():
        if end := DONE.match(line):
            kind, name, under = open_.pop(end[1])
            found.append(Span(kind, name, tuple(under)))
        elif begin := START.match(line):
            open_[begin[1]] = begin[2], _name(line), []
        elif "dot_general" in _name(line):
            for _, _, under in open_.values():
                under.append(_name(line))
    return found


def _name(line: str) -> str:
    name = NAME.search(line)
    return name[1] if name else ""


def _devices(line: str) -> int:
    """Of the first replica group, written as {{0,1},…}, as [groups,devices]<=…, or as mesh['data'=2,…] {'data',…}."""
    groups = GROUPS.search(line)
    if groups is None:
        return 0
    if groups["sizes"]:
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", groups["sizes"]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", groups["axes"]))
    return int(groups["each"]) if groups["each"] else groups["first"].count(",") + 1


def _bits(dtype: str) -> int:
    """Of a type as the compiler writes it; `pred` is a byte."""
    bits = BITS.search(dtype)
    return int(bits[0]) if bits else 8
