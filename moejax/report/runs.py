"""A workdir as one plain record: what the run was, its curves, its held-out numbers, its time, its routing tables."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from moejax.errors import DamagedError, UserError
from moejax.report import history
from moejax.train.workdir import read_lines


class NotYetError(UserError):
    """A run that has begun, and has said nothing yet."""


Line = dict[str, Any]
Number = float | int


class Curve(NamedTuple):
    """One number of a run, in the order it was logged."""

    step: Int[np.ndarray, " n"]
    value: Float[np.ndarray, " n"]


@dataclasses.dataclass(frozen=True)
class Run:
    """What a workdir holds. A run that has not ended has no `heldout`."""

    path: Path
    name: str
    config: Line
    facts: Line
    """run.json; empty where it is missing."""
    curves: dict[str, Curve]
    """By name, as in metrics.jsonl, without the full held-out evaluation."""
    heldout: dict[str, Number]
    """The full held-out evaluation, `heldout/...`; empty before the end."""
    clock: Curve
    """Training seconds since step 0, evaluation and saving left out."""
    seconds_per_step: float | None
    """Median over the timed intervals."""
    routing: dict[str, dict[str, np.ndarray]]
    """Sums by layer kind, each [layers, ...]: of all held-out rows, or before the end of one training step."""
    routing_from: str
    """`heldout`, the step, or empty."""
    events: list[Line]
    timing: dict[str, Curve] = dataclasses.field(default_factory=dict)
    """Seconds per step and memory by name, as in timing.jsonl."""

    @property
    def labels(self) -> list[str]:
        """Names of the kinds of text."""
        return list(self.facts.get("labels", ()))

    @property
    def steps(self) -> int:
        """The last logged step."""
        return max((int(curve.step[-1]) for curve in self.curves.values()), default=0)

    @property
    def planned(self) -> int:
        return int(self.config["train"]["steps"])

    @property
    def finished(self) -> bool:
        return bool(self.heldout) and self.steps >= self.planned

    @property
    def unfinished_note(self) -> str:
        """One line for a run that has not ended, empty for others."""
        if self.finished:
            return ""
        return (
            f"{self.name} is unfinished: step {self.steps} of {self.planned}, no full held-out evaluation yet; "
            "the command that started it goes on from its last checkpoint"
        )

    @property
    def drop_rate(self) -> float | None:
        """Share of requested assignments that were dropped, over all logged training steps; None without routing."""
        if "moe/drop_rate" not in self.curves:
            return None
        requested = self.curves["moe/requested"].value
        return float((self.curves["moe/drop_rate"].value * requested).sum() / max(requested.sum(), 1))

    def seconds_at(self, step: Int[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
        """Training seconds at these steps, straight between the logged ones."""
        return np.interp(step, np.append(0, self.clock.step), np.append(0.0, self.clock.value))


def load(path: Path) -> Run:
    """Reads one workdir.

    Raises UserError when there is no such folder, no run in it or nothing logged yet, DamagedError for a file that
    cannot be read as written.
    """
    if not path.is_dir():
        raise UserError(f"workdir {path} does not exist; give the --workdir that scripts/train.py was given")
    if not (path / "config.json").exists():
        raise UserError(f"workdir {path} is no run: it has no config.json; give the --workdir of scripts/train.py")
    config, facts = _json(path / "config.json"), _json(path / "run.json")
    try:
        name = str(config["name"])
        planned = int(config["train"]["steps"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"workdir {path} is no run: its config.json lacks name and train.steps") from error
    lines = _lines(path / "metrics.jsonl")
    if not lines:
        raise NotYetError(
            f"workdir {path} has logged no step of {planned} yet; wait for the first line of metrics.jsonl"
        )
    timing = _lines(path / "timing.jsonl")
    clock, median = _clock(timing)
    routing, routing_from = _routing(path / "routing")
    final = [line for line in lines if _is_final(line)]
    heldout = {key: value for key, value in final[-1].items() if key != "step"} if final else {}
    curves = _curves([line for line in lines if not _is_final(line)])
    events = _read(path / "events.jsonl")
    return Run(
        path, name, config, facts, curves, heldout, clock, median, routing, routing_from, events, _curves(timing)
    )


def load_all(paths: Sequence[Path]) -> list[Run]:
    """Reads workdirs in order; runs of one name are told apart by their folders."""
    runs = [load(path) for path in dict.fromkeys(paths)]
    names = [run.name for run in runs]
    return [
        dataclasses.replace(run, name=f"{run.name} ({run.path})") if names.count(run.name) > 1 else run for run in runs
    ]


def _is_final(line: Line) -> bool:
    return any(key.startswith("heldout") for key in line)


def _curves(lines: list[Line]) -> dict[str, Curve]:
    points: dict[str, list[tuple[int, Number]]] = {}
    for line in lines:
        for key, value in line.items():
            if key != "step":
                points.setdefault(key, []).append((line["step"], value))
    return {key: _curve(*zip(*found, strict=True)) for key, found in points.items()}


def _curve(step: Sequence[int], value: Sequence[Number] | np.ndarray) -> Curve:
    return Curve(np.asarray(step, np.int64), np.asarray(value, np.float64))


def _clock(lines: list[Line]) -> tuple[Curve, float | None]:
    """Seconds so far, and the median per step. An interval without a time (the first, with its compilation, and the
    first after a resume) counts at the median."""
    timed = [line["seconds_per_step"] for line in lines if "seconds_per_step" in line]
    if not timed:
        return _curve((), ()), None
    median = float(np.median(timed))
    steps = [line["step"] for line in lines]
    seconds = np.diff(steps, prepend=0) * [line.get("seconds_per_step", median) for line in lines]
    return _curve(steps, np.cumsum(seconds)), median


def _routing(folder: Path) -> tuple[dict[str, dict[str, np.ndarray]], str]:
    """The tables of the full held-out evaluation, else those of the last training step that has some."""
    files = sorted(folder.glob("[0-9]*.npz"))
    file = folder / "heldout.npz" if (folder / "heldout.npz").exists() else files[-1] if files else None
    if file is None:
        return {}, ""
    kinds: dict[str, dict[str, np.ndarray]] = {}
    for key, value in history.arrays(file).items():
        kind, _, name = key.rpartition(".")
        kinds.setdefault(kind, {})[name] = value
    return kinds, file.stem if file.stem == "heldout" else f"step {int(file.stem)}"


def _json(file: Path) -> Line:
    try:
        tree = json.loads(file.read_text()) if file.exists() else {}
    except (ValueError, OSError) as error:
        raise DamagedError(
            f"{file} cannot be read as JSON ({error}); restore it or report without this workdir"
        ) from error
    if not isinstance(tree, dict):
        raise DamagedError(f"{file} holds a {type(tree).__name__}, not an object; report without this workdir")
    return tree


def _lines(file: Path) -> list[Line]:
    """Lines of numbers, each with its step."""
    lines = _read(file)
    if not all(isinstance(line.get("step"), int) for line in lines):
        raise DamagedError(f"{file} has a line without an integer step; report without this workdir")
    return lines


def _read(file: Path) -> list[Line]:
    try:
        lines = read_lines(file)
    except (ValueError, OSError) as error:
        raise DamagedError(f"{file} cannot be read ({error}); report without this workdir") from error
    if not all(isinstance(line, dict) for line in lines):
        raise DamagedError(f"{file} has a line that is no JSON object; report without this workdir")
    return lines
