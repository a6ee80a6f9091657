"""What the processes of a run must settle among themselves: how long to wait for each other, whether they are the same, when to stop."""

from __future__ import annotations

import hashlib
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from moejax.errors import UserError

HEARTBEAT, SHUTDOWN, INITIALISATION = 30, 30, 300
"""Seconds after which a silent process counts as lost, that the last ones wait for each other, and that the first ones do.
jax waits 100 s, 300 s and 300 s if it is not told."""


def join(coordinator: str, processes: int, process: int) -> None:
    """Makes this process one of several."""
    jax.distributed.initialize(
        coordinator, processes, process,
        heartbeat_timeout_seconds=HEARTBEAT, shutdown_timeout_seconds=SHUTDOWN, initialization_timeout=INITIALISATION,
    )  # fmt: skip


def agree(mine: bool) -> bool:
    """Whether it is true on every process. All of them must ask."""
    if jax.process_count() == 1:
        return bool(mine)
    return bool(multihost_utils.process_allgather(np.asarray([mine], np.int32)).min())


def require_same(facts: dict[str, str]) -> None:
    """Raises UserError, on every process alike, where one has other facts than process 0.

    Args:
      facts: name -> anything; the same names everywhere.
    """
    if jax.process_count() == 1:
        return
    names = sorted(facts)
    mine = np.asarray([_words(facts[name]) for name in names], np.uint32)
    everyone = multihost_utils.process_allgather(mine[None]).reshape(jax.process_count(), len(names), -1)
    other = (everyone != everyone[0]).any(-1)
    if other.any():
        what = [names[i] for i in np.flatnonzero(other.any(0))]
        who = np.flatnonzero(other.any(1)).tolist()
        raise UserError(
            f"processes {who} differ from process 0 in: {', '.join(what)}. All run the same command, code and versions; start them again "
            "from one copy"
        )


def gathered(mine: dict[Any, list[str]]) -> dict[Any, set[str]]:
    """The sets of everyone's values by key, for keys that can be written as text."""
    if jax.process_count() == 1:
        return {key: set(values) for key, values in mine.items()}
    rows = [_words(str(key)) + _words(value) for key, values in mine.items() for value in values]
    everyone = multihost_utils.process_allgather(np.asarray(rows, np.uint32)[None]).reshape(-1, len(rows[0]))
    half = everyone.shape[1] // 2
    of_key: dict[bytes, set[bytes]] = {}
    for row in everyone:
        of_key.setdefault(row[:half].tobytes(), set()).add(row[half:].tobytes())
    return {key: {value.hex() for value in of_key[np.asarray(_words(str(key)), np.uint32).tobytes()]} for key in mine}


def _words(text: str) -> list[int]:
    """The SHA-256 of a text as eight numbers of 32 bits."""
    return np.frombuffer(hashlib.sha256(text.encode()).digest(), "<u4").tolist()


class Stop:
    """Whether the run was asked to stop. Of several processes all must poll equally often, and all see it at the same poll."""

    def __init__(self) -> None:
        self.signalled = False
        self._polls = 0

    def asked(self) -> bool:
        """To be called wherever the run can stop: between steps, and between batches of an evaluation."""
        self._polls += 1
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(self._polls)
        return self.signalled


@contextmanager
def stop_signal() -> Iterator[Stop]:
    """SIGTERM and Ctrl-C ask the run to save and stop; more of them change nothing, but a second Ctrl-C of a single process stops at
    once. With several processes SIGTERM of any of them stops all (jax's coordination service listens for it)."""
    if jax.process_count() > 1:
        yield Stop()
        return
    with signalled() as stop:
        yield stop


@contextmanager
def signalled() -> Iterator[Stop]:
    """The same for a process that is not one of several; asks no device."""
    stop = Stop()

    def ask(number: int, frame: Any) -> None:
        stop.signalled = True
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
