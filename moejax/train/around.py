"""Round the loop: a stopwatch, how much memory it took, a profile of chosen steps."""

from __future__ import annotations

import contextlib
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from moejax import config
from moejax.train.metrics import Numbers


class Stopwatch:
    """Seconds spent stepping, between laps."""

    def __init__(self) -> None:
        self.tokens_per_second = 0.0
        self._last_step: int | None = None
        self.restart()

    def restart(self) -> None:
        """Forgets what came before: the first step compiles."""
        self._since, self._away = time.perf_counter(), 0.0

    @contextlib.contextmanager
    def paused(self, pending: Any) -> Iterator[None]:
        """What happens inside is not stepping; `pending` is waited for first."""
        jax.block_until_ready(pending)
        began = time.perf_counter()
        yield
        self._away += time.perf_counter() - began

    def lap(self, step: int, tokens_per_step: int) -> Numbers:
        """Seconds per step since the last lap; the first lap starts after the step that compiled."""
        steps = step - self._last_step if self._last_step is not None else None
        seconds = time.perf_counter() - self._since - self._away
        self._last_step = step
        self.restart()
        if not steps:
            return {}
        self.tokens_per_second = steps * tokens_per_step / seconds
        return {"seconds_per_step": seconds / steps, "tokens_per_second": self.tokens_per_second}


def memory() -> Numbers:
    """Largest bytes so far: of this process, and of the fullest device where the backend tells it."""
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage(2) counts in kilobytes, but for macOS
    found = {"host_peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    peaks = [one["peak_bytes_in_use"] for one in stats if "peak_bytes_in_use" in one]
    return found | ({"device_peak_bytes": max(peaks)} if peaks else {})


class Profile:
    """Traces the chosen steps into profile/; a run resumed among them traces none."""

    def __init__(self, train: config.Train, path: Path):
        self._first, self._after = train.profile_from, train.profile_from + train.profile_steps
        self._path, self._running = path / "profile", False

    def before(self, step: int) -> None:
        """Starts the trace if this is the first of the steps."""
        if step == self._first and self._first < self._after:
            jax.profiler.start_trace(str(self._path))
            self._running = True

    def after(self, step: int, pending: Any) -> None:
        """Ends the trace after the last of the steps, when its results `pending` are there."""
        if self._running and step == self._after - 1:
            jax.block_until_ready(pending)
            jax.profiler.stop_trace()
            self._running = False
