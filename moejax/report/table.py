"""Runs side by side: one table for people, and the same numbers for programs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

from moejax.report import goodput
from moejax.report.runs import Number, Run

Value = Number | None
NONE = "–"


@dataclasses.dataclass(frozen=True)
class Row:
    """One number of every run. `ratio`: runs are compared by quotient, else by difference."""

    key: str
    title: str
    values: tuple[Value, ...]
    show: str
    """Format of a value."""
    ratio: bool = False
    comparable: bool = True
    """False where the runs were measured at different steps."""

    def compared(self, other: int) -> Value:
        """The first run less (or over) another one; None where either lacks the number."""
        first, second = self.values[0], self.values[other]
        if not self.comparable or first is None or second is None or (self.ratio and not second):
            return None
        return first / second if self.ratio else first - second

    def cells(self) -> list[str]:
        """What the table shows: a value per run, then a comparison with each run after the first."""
        found = [NONE if value is None else format(value, self.show) for value in self.values]
        for other in range(1, len(self.values)):
            value = self.compared(other)
            found.append(NONE if value is None else f"{value:.2f} x" if self.ratio else format(value, f"+{self.show}"))
        return found


def rows(runs: Sequence[Run]) -> list[Row]:
    """Every row that at least one run has a number for."""

    def row(key: str, title: str, value: Callable[[Run], Value], show: str, *, ratio: bool = False) -> Row:
        return Row(key, title, tuple(_number(value(run)) for run in runs), show, ratio)

    found = _evaluation(runs, "heldout", "held-out", lambda run: run.heldout)
    found += [
        row(
            "floor", "known entropy of held-out text [bits per byte]", lambda run: run.facts.get("heldout_floor"), ".4f"
        ),
        row("above_floor", "held-out above it [bits per byte]", _above_floor, ".4f"),
    ]
    found += _evaluation(runs, "heldout_capacity", "held-out at capacity", lambda run: run.heldout)
    if not all(run.finished for run in runs):
        found += _evaluation(runs, "eval", "last eval", _last_eval)
    found += [
        row("parameters/total", "parameters, total", lambda run: _parameters(run, "total"), ",d", ratio=True),
        row(
            "parameters/active",
            "parameters, active per token",
            lambda run: _parameters(run, "active"),
            ",d",
            ratio=True,
        ),
        row("steps", "training steps", lambda run: run.steps, ",d"),
        row("tokens", "training tokens", _tokens, ",d", ratio=True),
        row("milliseconds_per_step", "step time, median [ms]", _milliseconds, ",.1f", ratio=True),
        row("training_seconds", "training time [s]", _seconds, ",.1f", ratio=True),
        row("goodput", "time in steps [share of the run's]", lambda run: goodput.share(run.events), ".3f"),
        row("lost_steps", "steps lost and made again", lambda run: goodput.lost_steps(run.events) or None, ",d"),
        row("drop_rate", "drop rate in training [share]", lambda run: run.drop_rate, ".4f"),
    ]
    return [row for row in found if any(value is not None for value in row.values)]


def numbers(runs: Sequence[Run]) -> dict[str, Any]:
    """What the table shows, as JSON-able dicts. Numbers that a run lacks are left out."""
    found = rows(runs)
    return {
        "runs": [
            {"name": run.name, "workdir": str(run.path), "finished": run.finished, "planned_steps": run.planned}
            | {row.key: row.values[i] for row in found if row.values[i] is not None}
            for i, run in enumerate(runs)
        ],
        "comparisons": [
            {"first": runs[0].name, "second": runs[other].name}
            | {kind: _compared(found, other, kind == "ratio") for kind in ("difference", "ratio")}
            for other in range(1, len(runs))
        ],
    }


def header(runs: Sequence[Run]) -> list[str]:
    """Titles of the columns after the first."""
    names = [run.name if run.finished else f"{run.name} (unfinished)" for run in runs]
    return names + [f"{runs[0].name} vs {run.name}" for run in runs[1:]]


def text(runs: Sequence[Run]) -> str:
    """The table in plain text, a column per run, then comparisons, then notes."""
    lines = [["", *header(runs)], *([row.title, *row.cells()] for row in rows(runs))]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    shown = [
        "  ".join(
            [line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))]
        )
        for line in lines
    ]
    return "\n".join([shown[0].rstrip(), "-" * len(shown[0]), *(line.rstrip() for line in shown[1:]), *notes(runs)])


def notes(runs: Sequence[Run]) -> list[str]:
    """What a reader of the table must know."""
    found = [run.unfinished_note for run in runs if not run.finished]
    if len(runs) > 1:
        found.append("vs: the first run less the other, or over it (x) for sizes and times")
    if len({run.facts.get("data_hash") for run in runs}) > 1:
        found.append("the runs read different data (data_hash in run.json): their bits per byte do not compare")
    return found


def _evaluation(runs: Sequence[Run], prefix: str, title: str, of: Callable[[Run], dict[str, Number]]) -> list[Row]:
    """Bits per byte, whole and by label, and the state of routing, of one kind of evaluation."""
    all_numbers = [of(run) for run in runs]
    bits = f"{prefix}/bits_per_byte"
    labels = dict.fromkeys(key for of_run in all_numbers for key in of_run if key.startswith(f"{bits}/"))
    titles = {f"{prefix}/step": f"{title} at step", bits: f"{title} bits per byte"}
    titles |= {key: f"  {key.removeprefix(f'{bits}/')}" for key in labels}
    titles[f"{prefix}/moe/load_max"] = f"{title} max load [fair shares]"
    titles[f"{prefix}/moe/dead"] = f"{title} dead experts, all layers"
    if prefix.endswith("_capacity"):
        titles[f"{prefix}/moe/drop_rate"] = f"{title} drop rate [share]"
    shows = {f"{prefix}/step": ",d", f"{prefix}/moe/load_max": ".2f", f"{prefix}/moe/dead": ",d"}
    same_step = len({of_run.get(f"{prefix}/step") for of_run in all_numbers}) == 1
    found = {key: tuple(_number(of_run.get(key)) for of_run in all_numbers) for key in titles}
    return [Row(key, titles[key], found[key], shows.get(key, ".4f"), comparable=same_step) for key in titles]


def _last_eval(run: Run) -> dict[str, Number]:
    """The numbers of the last evaluation on a part of the held-out rows, and its step."""
    last = {key: curve.value[-1].item() for key, curve in run.curves.items() if key.startswith("eval/")}
    found = {key: int(value) if key.endswith("/dead") else value for key, value in last.items()}
    bits = run.curves.get("eval/bits_per_byte")
    return found if bits is None else {"eval/step": int(bits.step[-1])} | found


def _compared(found: list[Row], other: int, ratio: bool) -> dict[str, Value]:
    values = {row.key: row.compared(other) for row in found if row.ratio == ratio}
    return {key: value for key, value in values.items() if value is not None}


def _number(value: Value) -> Value:
    """JSON has no NaN."""
    return value if value is not None and math.isfinite(value) else None


def _parameters(run: Run, which: str) -> Value:
    return run.facts.get("parameters", {}).get(which)


def _above_floor(run: Run) -> Value:
    floor, bits = run.facts.get("heldout_floor"), run.heldout.get("heldout/bits_per_byte")
    return None if floor is None or bits is None else bits - floor


def _tokens(run: Run) -> Value:
    data = run.config.get("data", {})
    return run.steps * data["batch"] * data["context"] if {"batch", "context"} <= data.keys() else None


def _milliseconds(run: Run) -> Value:
    return None if run.seconds_per_step is None else 1e3 * run.seconds_per_step


def _seconds(run: Run) -> Value:
    return float(run.clock.value[-1]) if len(run.clock.value) else None
