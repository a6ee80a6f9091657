"""Paths with fields, such as `experts/{expert}/{part:gate|up}`: one pattern names many leaves.

    {name}               a whole number; 2 comes before 10
    {name:3..60}         a whole number of a range, last included; {name:0..60..2} takes every second
    {name:gate|up}       one of these words, in this order
    {name:*}             any text

A field's value is its **place** in that order: a number is its own place, a word or a number of a range counts from 0, text is itself.
So the same place may be spelled otherwise on the other side of a rule: {part:gate|up} there, {part:w1|w3} here.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import string
from collections.abc import Mapping

NUMBER = r"0|[1-9]\d*"
TEXT = r".+?"

Place = int | str


@dataclasses.dataclass(frozen=True)
class Field:
    """One field of a pattern."""

    name: str
    words: tuple[str, ...] | None
    """Spellings in order; None for any number or any text."""
    text: bool

    @property
    def expression(self) -> str:
        """What it matches, as a regular expression."""
        choices = "|".join(map(re.escape, self.words)) if self.words is not None else TEXT if self.text else NUMBER
        return f"(?P<{self.name}>{choices})"

    def place(self, found: str) -> Place:
        """Spelling -> place."""
        if self.words is not None:
            return self.words.index(found)
        return found if self.text else int(found)

    def spell(self, place: Place) -> str:
        """Place -> spelling; IndexError where the field has no such place."""
        return str(place) if self.words is None else self.words[int(place)]


def fields(pattern: str) -> dict[str, Field]:
    """The fields of a pattern by name, in order. Raises ValueError for a pattern that is none."""
    return {part.name: part for part in _parsed(pattern)[0] if isinstance(part, Field)}


def match(pattern: str, path: str) -> dict[str, Place] | None:
    """The place of every field if the whole path fits, else None."""
    parts, expression = _parsed(pattern)
    found = expression.fullmatch(path)
    if found is None:
        return None
    return {part.name: part.place(found[part.name]) for part in parts if isinstance(part, Field)}


def fill(pattern: str, places: Mapping[str, Place]) -> str:
    """The path with these places; a field that has none stands as it is written, for messages."""
    return "".join(
        part if isinstance(part, str) else part.spell(places[part.name]) if part.name in places else f"{{{part.name}}}"
        for part in _parsed(pattern)[0]
    )


@functools.cache
def _parsed(pattern: str) -> tuple[tuple[str | Field, ...], re.Pattern[str]]:
    parts: list[str | Field] = []
    for literal, name, kind, conversion in string.Formatter().parse(pattern):
        if literal:
            parts.append(literal)
        if name is None:
            continue
        if not name.isidentifier() or conversion or name in (p.name for p in parts if isinstance(p, Field)):
            raise ValueError(f"pattern {pattern!r}: a field is {{name}} or {{name:kind}}, each name once")
        parts.append(Field(name, _words(kind or "", pattern), kind == "*"))
    return tuple(parts), re.compile("".join(re.escape(p) if isinstance(p, str) else p.expression for p in parts))


def _words(kind: str, pattern: str) -> tuple[str, ...] | None:
    """The spellings that `kind` lists."""
    if kind in ("", "*"):
        return None
    if re.fullmatch(r"\d+\.\.\d+(\.\.\d+)?", kind):
        first, last, *step = map(int, kind.split(".."))
        found = tuple(map(str, range(first, last + 1, *step)))
    else:
        found = tuple(kind.split("|"))
    if not found or len(set(found)) < len(found) or "" in found:
        raise ValueError(
            f"pattern {pattern!r}: {kind!r} lists no places, or one twice; write {{name:a|b}} or {{name:0..9}}"
        )
    return found
