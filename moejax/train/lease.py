"""Who writes to a workdir: a file that its run keeps renewing. A second run is refused; a dead run's lease is taken over.

No clock is compared: a run is alive if its count goes up while another one watches, so clocks that jump or differ change nothing.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from pathlib import Path
from typing import Any

from moejax.errors import UserError

FILE = "lease.json"
BEAT = 5.0
"""Seconds between renewals."""
PATIENCE = 4 * BEAT
"""Seconds without one after which a run of another machine counts as dead."""


class Lease:
    """Held from `__init__` to `release`."""

    def __init__(self, folder: Path, beat: float = BEAT, patience: float = PATIENCE):
        """Raises UserError where another run holds the folder."""
        self._file, self._beat = folder / FILE, beat
        self._mine: dict[str, Any] = {"token": uuid.uuid4().hex, "count": 0, **_self()}
        self.taken_from = self._take(patience)
        """What the lease of a dead run said; None where there was none."""
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)
        self._thread.start()

    def _take(self, patience: float) -> dict[str, Any] | None:
        held = _read(self._file)
        if held is not None and _alive(held, self._file, patience):
            raise UserError(
                f"workdir {self._file.parent} belongs to a run that is alive (process {held['process']} on {held['host']}): wait for its "
                "end, stop it, or choose another --workdir"
            )
        self._write()
        time.sleep(min(0.05, self._beat))  # two that found the same dead lease: the later writer has it
        now = _read(self._file)
        if now is None or now["token"] != self._mine["token"]:
            raise UserError(f"workdir {self._file.parent} was taken by another run just now; choose another --workdir")
        return held

    def _write(self) -> None:
        beside = self._file.with_name(f".{FILE}.{self._mine['token']}")
        beside.write_text(json.dumps(self._mine))
        os.replace(beside, self._file)

    def _renew(self) -> None:
        while not self._stop.wait(self._beat):
            held = _read(self._file)
            if held is not None and held["token"] != self._mine["token"]:
                return  # taken over: this run was thought dead, and says so at its next save
            self._mine["count"] += 1
            with contextlib.suppress(OSError):  # a full disk is reported by what must be written
                self._write()

    def lost(self) -> bool:
        """Whether another run has taken the folder."""
        held = _read(self._file)
        return held is not None and held["token"] != self._mine["token"]

    def release(self) -> None:
        """The folder is free. A lease that another run has taken stays."""
        self._stop.set()
        self._thread.join()
        if not self.lost():
            self._file.unlink(missing_ok=True)


def alive(folder: Path, patience: float = 0.0) -> bool:
    """Whether a run that is alive holds the folder. One of another machine is watched for `patience` seconds, else it
    counts as dead."""
    held = _read(folder / FILE)
    return held is not None and _alive(held, folder / FILE, patience)


def _alive(held: dict[str, Any], file: Path, patience: float) -> bool:
    """A process of this machine is looked up; one of another is watched."""
    own = _self()
    if held["host"] == own["host"] and held["boot"] == own["boot"]:
        return _started(held["process"]) == held["started"]
    until = time.monotonic() + patience
    while time.monotonic() < until:
        now = _read(file)
        if now is None:
            return False
        if (now["token"], now["count"]) != (held["token"], held["count"]):
            return True
        time.sleep(patience / 20)
    return False


def _self() -> dict[str, Any]:
    process = os.getpid()
    return {"host": socket.gethostname(), "boot": _boot(), "process": process, "started": _started(process)}


def _boot() -> str:
    """Which start of which kernel this is: a container's process numbers mean nothing in another."""
    parts = []
    for place in ("/proc/sys/kernel/random/boot_id", "/proc/self/ns/pid"):
        try:
            parts.append(os.readlink(place) if place.endswith("pid") else Path(place).read_text().strip())
        except OSError:
            parts.append("")
    return " ".join(parts)


def _started(process: int) -> str:
    """When a process began, in ticks since the kernel's start; empty where there is no such process."""
    try:
        line = Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return ""
    fields = line.rsplit(")", 1)[1].split()
    return "" if fields[0] == "Z" else fields[19]


def _read(file: Path) -> dict[str, Any] | None:
    """The lease in the folder; one that was cut short is none."""
    try:
        return json.loads(file.read_text())
    except (OSError, json.JSONDecodeError):
        return None
