"""A sparse model, its dense twin at equal steps, and the twin again at equal time: trained side by side, one core each."""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moejax.errors import UserError
from moejax.report import runs
from moejax.train.workdir import read_lines

TRAIN = Path(__file__).parents[2] / "scripts" / "train.py"


@dataclasses.dataclass(frozen=True)
class Job:
    """One call of scripts/train.py."""

    config: str
    """FILE.py:VARIANT."""
    workdir: Path
    overrides: tuple[str, ...]
    core: int
    """Processors are shared out by this number."""

    def start(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, str(TRAIN), f"--config={self.config}", f"--workdir={self.workdir}", *self.overrides]
        # Two bars on one terminal overwrite each other: the runs print lines instead.
        environment = os.environ | {"TTY_COMPATIBLE": "0", "PYTHONUNBUFFERED": "1"}
        return subprocess.Popen(command, env=environment, preexec_fn=self._settle)

    def _settle(self) -> None:
        """In the child: keep to one core, so that the runs time alike."""
        if hasattr(os, "sched_setaffinity"):
            cores = sorted(os.sched_getaffinity(0))
            os.sched_setaffinity(0, {cores[self.core % len(cores)]})


def train(config: str, workdir: Path, overrides: Sequence[str]) -> list[Path]:
    """Trains the three and returns their workdirs: sparse, dense, dense at equal time. Finished runs are not repeated.

    The twin at equal time has as many more steps as the sparse step took longer, by the medians of this very run.
    """
    common = tuple(overrides)
    sparse = Job(f"{config}:sparse", workdir / "sparse", common, core=0)
    dense = Job(f"{config}:dense", workdir / "dense", common, core=1)
    first, second = sparse.start(), dense.start()
    try:
        _finish(second, dense)
        while first.poll() is None and not _timed(sparse):
            time.sleep(1)
        longer = (f"--config.train.steps={_equal_time_steps(sparse, dense)}", "--config.name=dense, equal time")
        equal_time = Job(f"{config}:dense", workdir / "dense_equal_time", (*common, *longer), core=1)
        second = equal_time.start()
        _finish(first, sparse)
        _finish(second, equal_time)
    except BaseException:
        for process in (first, second):
            process.terminate()
            process.wait()
        raise
    return [sparse.workdir, dense.workdir, equal_time.workdir]


def _finish(process: subprocess.Popen[bytes], job: Job) -> None:
    code = process.wait()
    if code:
        error = UserError(f"the run in {job.workdir} ended with exit code {code}; its message stands above")
        error.exit_code = code if code > 0 else 1
        raise error


def _timed(job: Job) -> bool:
    """Whether the run has timed enough steps for a median."""
    lines = read_lines(job.workdir / "timing.jsonl")
    return sum("seconds_per_step" in line for line in lines) >= 5


def _equal_time_steps(sparse: Job, dense: Job) -> int:
    """Steps of the dense twin that take as long as all of the sparse model's. A comparison that was begun keeps its number."""
    begun = sparse.workdir.parent / "dense_equal_time" / "config.json"
    if begun.exists():
        return json.loads(begun.read_text())["train"]["steps"]
    slow, fast = runs.load(sparse.workdir), runs.load(dense.workdir)
    if slow.seconds_per_step is None or fast.seconds_per_step is None:
        raise UserError("the runs are too short to time a step; raise train.steps above twice train.log_every")
    return max(fast.planned, round(fast.planned * slow.seconds_per_step / fast.seconds_per_step))


def summary(comparisons: Sequence[Sequence[runs.Run]]) -> dict[str, Any]:
    """Held-out bits per byte of every run by seed, what sparse gains over each twin, and means with sample deviations."""
    bits = [[run.heldout["heldout/bits_per_byte"] for run in found] for found in comparisons]
    gains = {"equal steps": [b[1] - b[0] for b in bits], "equal time": [b[2] - b[0] for b in bits]}
    return {
        "bits_per_byte": [dict(zip(("sparse", "dense", "dense, equal time"), b, strict=True)) for b in bits],
        "step_time_ratio": [
            (found[0].seconds_per_step or 0) / (found[1].seconds_per_step or 1) for found in comparisons
        ],
        "gain": {
            name: {"each": g, "mean": statistics.mean(g), "deviation": statistics.stdev(g)} for name, g in gains.items()
        },
    }


def summary_text(comparisons: Sequence[Sequence[runs.Run]]) -> str:
    """The same for a person."""
    found = summary(comparisons)
    lines = [f"{'seed':>4}  {'sparse':>8}  {'dense':>8}  {'dense, equal time':>18}  {'step time':>10}"]
    for i, (bits, ratio) in enumerate(zip(found["bits_per_byte"], found["step_time_ratio"], strict=True)):
        lines.append(
            f"{i:4}  "
            + "  ".join(f"{b:{w}.4f}" for b, w in zip(bits.values(), (8, 8, 18), strict=True))
            + f"  {ratio:9.2f}x"
        )
    for name, gain in found["gain"].items():
        lines.append(
            f"gain at {name}: {gain['mean']:+.4f} bits per byte, deviation {gain['deviation']:.4f} over {len(gain['each'])} seeds"
        )
    return "\n".join(lines)
