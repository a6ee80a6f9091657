"""Options of a run that must survive: saving, waiting, and faults to rehearse. A part of config.py."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """Saving and resuming."""

    every: int = 500
    """Steps between saves; the last step is always saved."""
    keep: int = 2
    """Most recent checkpoints to keep."""
    keep_every: int = 0
    """Also keep those whose step is a multiple of this; 0 for none."""
    keep_best: int = 0
    """Also keep so many of the lowest `best`; 0 for none."""
    best: str = "eval/loss"
    """A number of the latest evaluation, by which the best are kept: the lower the better."""


@dataclasses.dataclass(frozen=True)
class Watchdog:
    """Seconds without progress in a section of a run after which the process writes its stacks and ends with code 1; 0 for no limit."""

    init: float = 900.0
    """Data, mesh, first arrays; several processes find each other and compare what they run."""
    compile: float = 3600.0
    """Of the train step."""
    restore: float = 1800.0
    """Reading a checkpoint and checking it."""
    step: float = 900.0
    """One step, or the wait for the numbers of those that were started."""
    evaluation: float = 1800.0
    """One batch of an evaluation, its compilation included."""
    save: float = 1800.0
    """Starting a save, or waiting for the one before."""
    exit: float = 60.0
    """Cleaning up after an error, when other processes may be gone."""


@dataclasses.dataclass(frozen=True)
class Faults:
    """Faults to rehearse. Steps are counted from 1; 0 is never."""

    process: int = -1
    """Which process they befall; -1 for all."""
    die_at: int = 0
    """Step before which the process kills itself."""
    hang_at: int = 0
    """Step before which it stops moving."""
    raise_at: int = 0
    """Step before which it raises."""
    nan_at: int = 0
    """First step whose gradients are NaN, on all processes."""
    nan_steps: int = 1
    """So many steps from nan_at."""
    bad_batch: int = 0
    """Batch, counted from 1, whose targets are noise: the loss spikes."""
    slow_disk: float = 0.0
    """Seconds that each save takes longer."""
    disk_full_at: int = 0
    """Step from which a save finds the disk full."""
    corrupt_record: int = 0
    """Record of the training text, counted from 1, that cannot be read."""
