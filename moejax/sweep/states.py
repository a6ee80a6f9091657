"""Where each run of a sweep stands, read off its files: what a sweep that was killed, and its table, go by."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moejax.errors import PreemptedError
from moejax.sweep.members import Member
from moejax.train import lease
from moejax.train.workdir import read_lines

JOURNAL = "sweep.jsonl"
DONE, RUNNING, FAILED, STOPPED, WAITING = "done", "running", "failed", "stopped", "waiting"


@dataclasses.dataclass(frozen=True)
class State:
    """Of one run."""

    kind: str
    """done, running, failed, stopped (began, and goes on when the sweep does) or waiting (not begun)."""
    step: int
    """The last one logged."""
    steps: int
    code: int = 0
    """Exit code of a run that failed."""
    loss: float | None = None
    """Bits per byte of the last evaluation."""

    @property
    def text(self) -> str:
        """For a table."""
        return f"failed, exit code {self.code}" if self.kind == FAILED else self.kind


def note(root: Path, event: str, member: Member, **details: Any) -> None:
    """One line of sweep.jsonl."""
    with open(root / JOURNAL, "a") as out:
        line = {"event": event, "id": member.id, "name": member.name, "time": round(time.time(), 3), **details}
        out.write(json.dumps(line) + "\n")


def codes(root: Path) -> dict[str, int]:
    """How the runs ended that did, the last time, by id."""
    ends = [line for line in read_lines(root / JOURNAL) if line["event"] in ("started", "ended")]
    last = {line["id"]: line for line in ends}
    return {id: line["code"] for id, line in last.items() if line["event"] == "ended"}


def of(root: Path, members: Sequence[Member]) -> dict[str, State]:
    """State of every member, by id."""
    ended = codes(root)
    return {member.id: _state(root / member.folder, member, ended.get(member.id)) for member in members}


def _state(folder: Path, member: Member, code: int | None) -> State:
    lines = read_lines(folder / "metrics.jsonl")
    steps = member.config.train.steps
    step = max((line["step"] for line in lines), default=0)
    bits = [line[key] for line in lines for key in ("eval/bits_per_byte", "heldout/bits_per_byte") if key in line]
    loss = bits[-1] if bits else None
    if any(key.startswith("heldout") for line in lines for key in line):
        return State(DONE, step, steps, loss=loss)
    if lease.alive(folder):
        return State(RUNNING, step, steps, loss=loss)
    if code and code != PreemptedError.exit_code:
        return State(FAILED, step, steps, code, loss)
    return State(STOPPED if folder.exists() else WAITING, step, steps, loss=loss)
