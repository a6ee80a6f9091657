"""Runs a sweep on this machine, some at a time. The same call goes on where it was stopped or killed, and repeats nothing."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path

from moejax.errors import PreemptedError
from moejax.sweep import states
from moejax.sweep.members import Member
from moejax.sweep.states import DONE, FAILED, RUNNING
from moejax.train import hosts, lease

POLL, SHOW = 0.5, 3.0
"""Seconds between looks at the processes, and between calls of `show`."""
Show = Callable[[dict[str, states.State]], None]


class Local:
    """A queue of runs and the slots they run in."""

    def __init__(
        self,
        members: Sequence[Member],
        root: Path,
        command: Callable[[Member], list[str]],
        *,
        at_once: int = 1,
        environment: dict[str, str] | None = None,
        retry: bool = False,
    ):
        """
        Args:
          command: of a run.
          at_once: runs at a time; each keeps to its share of the processors.
          environment: variables of the runs, in which `{slot}` is 0 to at_once - 1, such as CUDA_VISIBLE_DEVICES.
          retry: start those that failed, too.
        """
        found = states.of(root, members)
        skipped = (DONE,) if retry else (DONE, FAILED)
        self.members, self.root, self.command = members, root, command
        self.environment = environment or {}
        self.queue = deque(member for member in members if found[member.id].kind not in skipped)
        self.slots: list[tuple[Member, subprocess.Popen[bytes]] | None] = [None] * at_once

    def run(self, show: Show) -> dict[str, states.State]:
        """Until every run has ended; `show` is called with the states every few seconds. Raises PreemptedError when asked to stop, after
        the runs have saved."""
        self.root.mkdir(parents=True, exist_ok=True)
        shown = 0.0
        with hosts.signalled() as stop:
            try:
                while self.queue or any(self.slots):
                    if stop.signalled:
                        raise PreemptedError(f"the sweep was asked to stop; the same command goes on with {self.root}")
                    changed = self._collect() + self._fill()
                    if changed or time.monotonic() > shown + SHOW:
                        show(self._states())
                        shown = time.monotonic()
                    time.sleep(POLL)
            finally:
                self._stop()
        found = self._states()
        show(found)
        return found

    def _states(self) -> dict[str, states.State]:
        """By id; a run that was started has begun, although it has not said so yet."""
        found = states.of(self.root, self.members)
        for member, process in filter(None, self.slots):
            if process.poll() is None:
                found[member.id] = dataclasses.replace(found[member.id], kind=RUNNING)
        return found

    def _collect(self) -> int:
        """Frees the slots of runs that ended; how many. One that was preempted alone goes to the end of the queue."""
        ended = [
            (slot, *held) for slot, held in enumerate(self.slots) if held is not None and held[1].poll() is not None
        ]
        for slot, member, process in ended:
            self.slots[slot] = None
            states.note(self.root, "ended", member, code=process.returncode)
            if process.returncode == PreemptedError.exit_code:
                self.queue.append(member)
        return len(ended)

    def _fill(self) -> int:
        """Starts what there is room for; how many. A run that a process of before still holds waits: it is saving, or goes on alone."""
        started = 0
        for slot in (slot for slot, held in enumerate(self.slots) if held is None):
            free = (m for m in self.queue if not lease.alive(self.root / m.folder, lease.PATIENCE))
            if (member := next(free, None)) is not None:
                self.queue.remove(member)
                self.slots[slot] = member, self._start(member, slot)
                started += 1
        return started

    def _start(self, member: Member, slot: int) -> subprocess.Popen[bytes]:
        folder = self.root / member.folder
        folder.mkdir(exist_ok=True)
        child = [sys.executable, "-m", "moejax.sweep.child", *map(str, (os.getpid(), slot, len(self.slots)))]
        environment = os.environ | {"TTY_COMPATIBLE": "0", "PYTHONUNBUFFERED": "1"}
        environment |= {key: value.replace("{slot}", str(slot)) for key, value in self.environment.items()}
        states.note(self.root, "started", member, slot=slot)
        with open(folder / "output.txt", "ab") as out:
            return subprocess.Popen(
                [*child, *self.command(member)], env=environment, start_new_session=True,
                stdout=out, stderr=out, stdin=subprocess.DEVNULL,
            )  # fmt: skip

    def _stop(self) -> None:
        """Asks what still runs to save and end, and waits for it."""
        held = list(filter(None, self.slots))
        for _, process in held:
            process.terminate()
        for member, process in held:
            states.note(self.root, "ended", member, code=process.wait())
