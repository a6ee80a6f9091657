"""Tile sizes that were measured on a chip, in tuned.json; `scripts/tune.py` writes it. What is not there gets the static rule."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from moejax.kernels.chips import ChipSpec

Tiles = TypeVar("Tiles")
_WATCHED: ContextVar[list[tuple[Any, Any]] | None] = ContextVar("watched", default=None)
TABLE = Path(__file__).with_name("tuned.json")
"""A list of entries: the fields of a Problem, `tiles`, and what was measured."""


class Problem(NamedTuple):
    """What tile sizes depend on. Rows count by the power of two at or below the mean of a group: loads are not known when a program
    is compiled."""

    chip: str
    kernel: str
    """matmul, input_gradient, glu, dglu or weight_gradient."""
    dtype: str
    """Of the weights, or of the rows of a weight gradient."""
    pairs: int
    """Operands of rows and weights that are contracted."""
    depth: int
    """Contracted; of a weight gradient the columns of x."""
    columns: int
    """Of the result."""
    rows_per_group: int


def problem(
    chip: ChipSpec, kernel: str, dtype: Any, *, pairs: int, depth: int, columns: int, rows: int, groups: int
) -> Problem:
    """As `Problem`, of `rows` rows in all."""
    mean = max(1, rows // max(1, groups))
    return Problem(chip.name, kernel, str(dtype), pairs, depth, columns, 1 << mean.bit_length() - 1)


def choose(asked: Problem, given: Tiles | None, kind: type[Tiles], rule: Callable[[], Tiles]) -> Tiles:
    """What the caller gave, else what was measured of this very problem (fields of `kind`), else the rule's."""
    measured = table().get(asked)
    tiles = given or (kind(**measured) if measured else rule())
    if (seen := _WATCHED.get()) is not None:
        seen.append((asked, tiles))
    return tiles


@contextlib.contextmanager
def watched() -> Iterator[list[tuple[Problem, Any]]]:
    """Lists the problems of the kernels that are traced inside, and the tiles chosen."""
    seen: list[tuple[Problem, Any]] = []
    token = _WATCHED.set(seen)
    try:
        yield seen
    finally:
        _WATCHED.reset(token)


@functools.cache
def table() -> dict[Problem, dict[str, int]]:
    """tuned.json, read once."""
    return {key(entry): entry["tiles"] for entry in json.loads(TABLE.read_text())}


def key(entry: dict[str, Any]) -> Problem:
    """The problem that an entry is of."""
    return Problem(*(entry[field] for field in Problem._fields))


def merge(old: list[dict[str, Any]], new: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Entries in the order of their problems; of one problem the new one."""
    return [entry for _, entry in sorted({key(entry): entry for entry in (*old, *new)}.items())]


def write(path: Path, entries: list[dict[str, Any]]) -> None:
    """The table as a file, an entry a line; the old one stays until the new one is whole."""
    lines = ",\n".join(json.dumps(e) for e in entries)
    new = path.with_suffix(".new")
    new.write_text(f"[\n{lines}\n]\n" if entries else "[]\n")
    new.replace(path)


def entry(asked: Problem, tiles: Any, **measured: Any) -> dict[str, Any]:
    """One line of the table."""
    return asked._asdict() | {"tiles": dataclasses.asdict(tiles)} | measured
