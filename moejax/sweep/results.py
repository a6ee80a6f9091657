"""What a sweep found: one row a run, and one a setting with its seeds taken together."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moejax.report import runs, table
from moejax.sweep.members import Member, name_of
from moejax.sweep.states import DONE, State

SEED = "seed"
"""Last name of the options that are not told apart: runs that differ in them alone are one setting."""
Row = dict[str, Any]


def rows(root: Path, members: Sequence[Member], found: dict[str, State]) -> list[Row]:
    """Of every member: id, name, folder, state, overrides, and `numbers` as scripts/report.py has them (empty before the end)."""

    def row(member: Member) -> Row:
        state, numbers = found[member.id], {}
        if state.kind == DONE:
            (numbers,) = table.numbers([runs.load(root / member.folder)])["runs"]
        own = {key: value for key, value in member.overrides.items() if key != "name"}
        return {
            "id": member.id, "name": member.name, "folder": member.folder, "state": state.text, "step": state.step,
            "overrides": own, "numbers": {key: value for key, value in numbers.items() if isinstance(value, int | float)},
        }  # fmt: skip

    return [row(member) for member in members]


def settings(found: Sequence[Row]) -> list[Row]:
    """Rows that differ in seeds alone, as one: `runs` that have ended, mean and sample deviation of each number that they all have."""
    groups: dict[str, list[Row]] = {}
    for row in found:
        kept = {key: value for key, value in row["overrides"].items() if key.rsplit(".", 1)[-1] != SEED}
        groups.setdefault(json.dumps(kept, sort_keys=True), []).append(row | {"overrides": kept})
    return [_setting(group) for group in groups.values()]


def _setting(group: list[Row]) -> Row:
    ended = [row["numbers"] for row in group if row["numbers"]]
    common = [key for key in ended[0] if all(key in numbers for numbers in ended)] if ended else []
    values = {key: [numbers[key] for numbers in ended] for key in common}
    names = {row["name"] for row in group}
    return {
        "name": names.pop() if len(names) == 1 and len(group) > 1 else name_of(group[0]["overrides"]),
        "overrides": group[0]["overrides"],
        "runs": len(ended),
        "of": len(group),
        "mean": {key: statistics.fmean(each) for key, each in values.items()},
        "deviation": {key: statistics.stdev(each) if len(each) > 1 else None for key, each in values.items()},
        "each": values,
    }


COLUMNS = {
    "heldout/bits_per_byte": ("held-out bits per byte", ".4f"),
    "heldout/moe/dead": ("dead", ".1f"),
    "heldout/moe/load_max": ("max load", ".2f"),
    "parameters/total": ("parameters", ",.0f"),
    "parameters/active": ("active", ",.0f"),
    "milliseconds_per_step": ("step [ms]", ",.1f"),
}
"""Numbers of the table, with title and format; a column that no setting has is left out."""


def text(found: Sequence[Row]) -> str:
    """Settings in plain text: means, and ± the sample deviation over seeds of what differs between them."""
    shown = [key for key in COLUMNS if any(key in row["mean"] for row in found)]
    lines = [["setting", "runs", *(COLUMNS[key][0] for key in shown)]]
    for row in found:
        lines.append([row["name"], f"{row['runs']}/{row['of']}", *(_cell(row, key) for key in shown)])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    aligned = ["  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip() for line in lines]
    return "\n".join([aligned[0], "-" * sum(w + 2 for w in widths), *aligned[1:]])


def _cell(row: Row, key: str) -> str:
    if key not in row["mean"]:
        return table.NONE
    show, deviation = COLUMNS[key][1], row["deviation"][key]
    return format(row["mean"][key], show) + (f" ± {format(deviation, show)}" if deviation else "")
