"""What a compiled program sends: its collectives, read off its text."""

from __future__ import annotations

import math
import re
from typing import NamedTuple

KINDS = ("ragged-all-to-all", "all-to-all", "all-gather", "all-reduce", "reduce-scatter", "collective-permute")
LINE = re.compile(rf"^ *(?:ROOT )?%\S+ = (.*?) ({'|'.join(KINDS)})(?:-start)?\(.*", re.MULTILINE)
ARRAY = re.compile(r"(\w+)\[([\d,]*)\]")
NAME = re.compile(r'op_name="([^"]*)"')
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


def of(text: str) -> list[Collective]:
    """Every collective of a program, once however often a loop turns."""
    found = []
    for line in LINE.finditer(text):
        arrays = ARRAY.findall(line[1])
        shapes = tuple(tuple(int(n) for n in dims.split(",") if n) for _, dims in arrays)
        size = sum(_bits(dtype) * math.prod(shape) // 8 for (dtype, _), shape in zip(arrays, shapes, strict=True))
        name = NAME.search(line[0])
        found.append(Collective(line[2], arrays[0][0], shapes, size, name[1] if name else ""))
    return found


def _bits(dtype: str) -> int:
    """Of a type as the compiler writes it; `pred` is a byte."""
    bits = BITS.search(dtype)
    return int(bits[0]) if bits else 8
