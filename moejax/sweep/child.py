"""Becomes a run of a sweep: keeps to its processors, and is asked to stop (and saves) if the sweep dies.

python -m moejax.sweep.child PARENT SLOT SLOTS COMMAND...
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1
"""prctl(2) of Linux: the signal that this process gets when its parent ends; it outlives exec."""


def keep_to(slot: int, slots: int) -> None:
    """This slot's share of the processors, where the system can say it: runs side by side then time alike."""
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, cores[slot::slots] or {cores[slot % len(cores)]})


def follow(parent: int) -> None:
    """SIGTERM when the parent ends, on Linux. Elsewhere the run goes on alone, and the sweep waits for it when it is started again."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:
        sys.exit(75)


def main(arguments: list[str]) -> None:
    parent, slot, slots = map(int, arguments[:3])
    follow(parent)
    keep_to(slot, slots)
    os.execv(arguments[3], arguments[3:])


if __name__ == "__main__":
    main(sys.argv[1:])
