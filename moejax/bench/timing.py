"""Timing functions side by side: in turn within one run, so that a noisy machine troubles all of them alike."""

from __future__ import annotations

import dataclasses
import os
import platform
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

BURST = 0.02
"""Seconds that the calls of one sample take together: the time of starting them disappears behind the first."""


@dataclasses.dataclass(frozen=True)
class Times:
    """Seconds of one call over all rounds."""

    median: float
    low: float
    """10th percentile."""
    high: float
    """90th percentile."""


def interleaved(calls: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, Times]:
    """Percentiles of `samples`."""
    seconds = samples(calls, rounds)
    return {name: Times(*(float(np.percentile(s, q)) for q in (50, 10, 90))) for name, s in seconds.items()}


def samples(
    calls: Mapping[str, Callable[[], Any]], rounds: int, clocks: Mapping[str, Callable[[], float]] | None = None
) -> dict[str, list[float]]:
    """Seconds of each function, called once a round in an order that rotates, after one round that compiles.

    `clocks` are functions that return their own seconds: what runs in another process."""
    timed = {name: lambda call=call: _seconds(call) for name, call in calls.items()} | dict(clocks or {})
    names = list(timed)
    for name in names:
        timed[name]()
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            seconds[name].append(timed[name]())
    return seconds


def _seconds(call: Callable[[], Any]) -> float:
    began = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - began


def bursts(calls: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of one call on an accelerator. A sample is a burst of calls of which only the last is waited for."""

    def burst(call: Callable[[], Any]) -> tuple[Callable[[], Any], int]:
        jax.block_until_ready(call())
        number = int(np.clip(np.ceil(BURST / _seconds(call)), 1, 100))

        def repeat() -> Any:
            for _ in range(number - 1):
                call()
            return call()

        return repeat, number

    made = {who: burst(call) for who, call in calls.items()}
    seconds = samples({who: repeat for who, (repeat, _) in made.items()}, rounds)
    return {who: [s / made[who][1] for s in taken] for who, taken in seconds.items()}


def error_of(got: Any, wanted: Any) -> float:
    """The largest of the results' errors, each in the norm of what is wanted; every row belongs to a group here."""

    def one(a: jax.Array, b: jax.Array) -> float:
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
        return float(jnp.linalg.norm((a - b).reshape(-1)) / jnp.linalg.norm(b.reshape(-1)))

    return max(map(one, jax.tree.leaves(got), jax.tree.leaves(wanted)))


def ratios(calls: Mapping[str, Callable[[], Any]], base: str, rounds: int) -> dict[str, dict[str, float]]:
    """Of each function to `base`, round by round: median, 10th and 90th percentile of the ratio."""
    seconds = samples(calls, rounds)
    found = {}
    for name, mine in seconds.items():
        ratio = np.asarray(mine) / np.asarray(seconds[base])
        found[name] = {
            q: round(float(np.percentile(ratio, p)), 4) for q, p in (("median", 50), ("low", 10), ("high", 90))
        }
    return found


def machine() -> dict[str, Any]:
    """Where the numbers were taken."""
    return {
        "platform": jax.default_backend(),
        "devices": sorted({d.device_kind for d in jax.devices()}),
        "cores": len(os.sched_getaffinity(0)),
        "processor": _processor(),
        "python": platform.python_version(),
        "jax": jax.__version__,
    }


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next(
                (line.split(":")[1].strip() for line in file if line.startswith("model name")), platform.machine()
            )
    except OSError:
        return platform.machine()
