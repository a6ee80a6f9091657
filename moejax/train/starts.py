"""Runs that begin with a state made elsewhere: step 0 of a new workdir."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moejax import config
from moejax.checkpoint.manager import Checkpoints
from moejax.errors import UserError
from moejax.train.state import TrainState
from moejax.train.workdir import Workdir


def require_new(workdir: Path) -> None:
    """Raises UserError where a run is already there."""
    if (workdir / "config.json").exists() or any((workdir / "checkpoints").glob("*")):
        raise UserError(f"--workdir={workdir} already holds a run; choose another --workdir, or delete it")


def write(workdir: Path, cfg: config.Config, state: TrainState, event: str, **facts: Any) -> None:
    """A workdir whose run begins with this state at step 0. The checkpoint comes first: a workdir without it would train from nothing."""
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--workdir={workdir} cannot be written: {error.strerror}; choose another") from error
    checkpoints = Checkpoints(workdir / "checkpoints", cfg.checkpoint)
    checkpoints.save(0, state)
    checkpoints.close()
    files = Workdir(str(workdir), cfg, primary=True)
    files.event(event, **facts)
    files.close()
