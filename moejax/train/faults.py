"""Faults that a run brings about itself, so that tests and users can rehearse what happens. `config.faults` says when and where."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import time
from collections.abc import Iterator

import jax

from moejax import config
from moejax.errors import ConfigError

FEW_BYTES = 4096
"""What a full disk still takes of a file."""


def here(faults: config.Faults) -> bool:
    """Whether this process is the one that fails."""
    return faults.process in (-1, jax.process_index())


def before_step(faults: config.Faults, step: int) -> None:
    """Dies, hangs or raises if it is time."""
    if not here(faults):
        return
    if step == faults.die_at:
        os.kill(os.getpid(), signal.SIGKILL)
    if step == faults.hang_at:
        while True:
            time.sleep(3600)
    if step == faults.raise_at:
        raise RuntimeError(f"config.faults.raise_at={step}")


def bad_numbers(faults: config.Faults, step: jax.Array) -> jax.Array:
    """Whether gradients become NaN at this step, i32[] counted from 0."""
    return (step + 1 >= faults.nan_at) & (step + 1 < faults.nan_at + faults.nan_steps)


@contextlib.contextmanager
def saving(faults: config.Faults, step: int) -> Iterator[None]:
    """Round a save and its wait: a disk that is slow, or full from this step on."""
    if here(faults) and faults.slow_disk:
        time.sleep(faults.slow_disk)
    if not (here(faults) and faults.disk_full_at and step >= faults.disk_full_at):
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (FEW_BYTES, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def check(faults: config.Faults) -> None:
    """The rules of config.faults."""
    for name in ("die_at", "hang_at", "raise_at", "nan_at", "bad_batch", "disk_full_at", "corrupt_record"):
        if getattr(faults, name) < 0:
            raise ConfigError(
                f"faults.{name}={getattr(faults, name)}: the number of a step, batch or record, or 0 for none"
            )
    if faults.slow_disk < 0 or faults.nan_steps < 1:
        raise ConfigError(
            f"faults.slow_disk={faults.slow_disk}, nan_steps={faults.nan_steps}: not below 0, and at least 1"
        )
