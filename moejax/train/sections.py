"""What a run is doing, section by section: the seconds of each are added up, and a section that does not move ends the process.

    with sections.of("evaluation"):
        ...

An inner section's time is not its outer one's. The watchdog is a thread of its own, so it sees a main thread that is stuck in the
compiler, in a collective that waits for a dead host, or on a disk.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

NAMES = ("init", "compile", "restore", "step", "evaluation", "save", "other", "exit")
FAILED = 1
"""Exit code of a process that the watchdog ends."""


class Sections:
    """The ledger of one process, and its watchdog."""

    def __init__(
        self, limits: dict[str, float], stacks: Path, tell: Callable[[str, float], None] = lambda name, seconds: None
    ):
        """
        Args:
          limits: seconds without a beat, by section, after which the process ends; 0 or none for no limit.
          stacks: file that gets the stack of every thread then.
          tell: called then with the section and its seconds.
        """
        self.seconds = dict.fromkeys(NAMES, 0.0)
        self._limits, self._stacks, self.tell = limits, stacks, tell
        self._open: list[str] = []
        self._since = self._beat = time.monotonic()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    @contextlib.contextmanager
    def of(self, name: str) -> Iterator[None]:
        """What happens inside is this section."""
        self.enter(name)
        try:
            yield
        finally:
            self.leave()

    def enter(self, name: str) -> None:
        self._turn()
        self._open.append(name)

    def leave(self) -> None:
        self._turn()
        self._open.pop()

    def beat(self) -> None:
        """The section moves."""
        self._turn()

    def _turn(self) -> None:
        now = time.monotonic()
        if self._open:
            self.seconds[self._open[-1]] += now - self._since
        self._since = self._beat = now

    def _watch(self) -> None:
        while not self._closed.wait(0.2):
            name = self._open[-1] if self._open else ""
            stuck = time.monotonic() - self._beat
            if 0 < self._limits.get(name, 0.0) < stuck:
                self._end(name, stuck)

    def _end(self, name: str, seconds: float) -> None:
        print(
            f"error: {name} has not moved for {seconds:.0f} s; stacks of all threads are in {self._stacks}",
            file=sys.stderr,
        )
        with contextlib.suppress(Exception):  # whatever else is broken, the process ends
            with open(self._stacks, "w") as out:
                faulthandler.dump_traceback(out, all_threads=True)
            self.tell(name, seconds)
        sys.stderr.flush()
        os._exit(FAILED)

    def close(self) -> None:
        """No watchdog from here on."""
        self._closed.set()
        self._thread.join()
