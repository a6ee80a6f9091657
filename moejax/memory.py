"""Memory of the host where it is the device."""

from __future__ import annotations

import ctypes
import platform

import jax

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX, M_ARENA_MAX = -1, -2, -4, -8
"""Parameters of glibc's mallopt (mallopt(3))."""


def keep_freed() -> bool:
    """Asks the C library to keep what is freed for the next to allocate, where JAX computes on the CPU of a Linux machine.

    XLA allocates the buffers of a program anew each time it runs. By default large ones go back to the system at once, and every page
    of them is faulted in again: a fifth of the time of a sparse layer on a CPU (docs/experiments.md). What threads allocate is kept only
    in the one arena that all share, so that is asked for before there is a backend, whose threads would have others. The process then
    holds the most it has used. Returns whether it was done."""
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    shared = libc.mallopt(M_ARENA_MAX, 1) == 1
    if jax.default_backend() != "cpu":
        libc.mallopt(M_ARENA_MAX, 0)  # as many as it likes
        return False
    wanted = ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, 2**31 - 1), (M_TOP_PAD, 64 * 2**20))
    return shared and all([libc.mallopt(name, value) == 1 for name, value in wanted])
