"""The schedulers that can run a sweep. moejax writes what they need and schedules nothing; scripts/sweep.py --engine=NAME."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from moejax.sweep import jobset, skypilot, slurm, spec
from moejax.sweep.plan import Plan


@dataclasses.dataclass(frozen=True)
class Engine:
    """One scheduler."""

    options: type[spec.Options]
    """What --set can say."""
    files: Callable[[Plan, Any], spec.Files]
    """Plan and options -> files. Raises ConfigError where they cannot be run."""
    submit: str
    """The command that takes the first file."""


ENGINES = {
    "slurm": Engine(slurm.Slurm, slurm.files, "sbatch"),
    "skypilot": Engine(skypilot.SkyPilot, skypilot.files, "bash"),
    "jobset": Engine(jobset.JobSet, jobset.files, "kubectl apply -f"),
}


def write(
    plan: Plan, engine: str, settings: Sequence[str], env: Mapping[str, str], out: Path
) -> tuple[list[Path], str]:
    """Writes the files of a sweep.

    Args:
      settings: KEY=VALUE for the engine's options.
      env: variables of the runs.
      out: folder on this machine; made if it is missing.

    Returns:
      the files, and the command to type next.
    """
    found = ENGINES[engine]
    files = found.files(plan, spec.read(found.options, settings, env))
    out.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (out / name).write_text(text)
    paths = [out / name for name in files]
    return paths, f"{found.submit} {shlex.quote(str(paths[0]))}"
