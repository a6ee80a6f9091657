"""What an asynchronous save costs the steps, digests included: blocks of steps with a save in front and without, in turn in one run."""

from __future__ import annotations

import dataclasses
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from moejax import config
from moejax import mesh as meshes
from moejax.bench import timing
from moejax.checkpoint import digests
from moejax.checkpoint.manager import Checkpoints, flatten
from moejax.data import batches, prepare
from moejax.data.pipeline import Stream
from moejax.train import state, step

BLOCK = 30
"""Steps of a block: more than a save takes to be written."""


def run(cfg: config.Config, rounds: int) -> dict[str, Any]:
    """Seconds that a save adds to the steps around it, and the share of the time that is at `checkpoint.every`."""
    mesh = meshes.make(cfg.mesh)
    stream = Stream(cfg.data, prepare.ensure(cfg.data))
    sums: Any = None
    with jax.set_mesh(mesh), tempfile.TemporaryDirectory() as folder:
        built = state.build(cfg, mesh)
        now = state.create(built)
        update = step.make_train_step(built, now)
        total = batches.padded_rows(cfg, mesh, cfg.data.batch)
        given = [batches.put(stream.read(i), mesh, total) for i in range(8)]
        checkpoints = Checkpoints(Path(folder), dataclasses.replace(cfg.checkpoint, keep=1))
        taken: dict[str, list[float]] = {"without": [], "with": [], "digests": []}
        number = 0
        for turn in range(rounds + 1):
            for kind in ("without", "with") if turn % 2 else ("with", "without"):
                began = time.perf_counter()
                if kind == "with":
                    number += 1
                    checkpoints.save(number, now)
                for i in range(BLOCK):
                    now, sums, _ = update(now, given[i % len(given)])
                jax.block_until_ready(sums)
                if kind == "with":
                    checkpoints.wait()
                taken[kind].append(time.perf_counter() - began)
            began = time.perf_counter()
            digests.of(flatten(now))
            taken["digests"].append(time.perf_counter() - began)
        size = sum(x.nbytes for x in jax.tree.leaves(now))
        checkpoints.close()
    return _summary(cfg, {kind: np.asarray(s[1:]) for kind, s in taken.items()}, size, rounds)


def _summary(cfg: config.Config, taken: dict[str, np.ndarray], size: int, rounds: int) -> dict[str, Any]:
    """Of the rounds after the first, which compiles."""
    one = float(np.median(taken["without"])) / BLOCK
    extra = taken["with"] - taken["without"]
    ms = {q: round(1e3 * float(np.percentile(extra, p)), 2) for q, p in (("median", 50), ("low", 10), ("high", 90))}
    return {
        "machine": timing.machine(),
        "rounds": rounds,
        "state_megabytes": round(size / 1e6, 2),
        "step_ms": round(1e3 * one, 3),
        "save_adds_ms": ms,
        "digests_ms": round(1e3 * float(np.median(taken["digests"])), 3),
        "checkpoint_every": cfg.checkpoint.every,
        "share_of_step_time": round(float(np.median(extra)) / (cfg.checkpoint.every * one), 5),
        "share_in_the_block": round(float(np.median(extra / taken["without"])), 4),
    }


def table(result: dict[str, Any]) -> str:
    """The numbers for a person."""
    ms = result["save_adds_ms"]
    return (
        f"a step takes {result['step_ms']:.1f} ms, a save of {result['state_megabytes']:.1f} MB adds {ms['median']:.0f} ms "
        f"({ms['low']:.0f} to {ms['high']:.0f}) to the steps beside it, of which digests are {result['digests_ms']:.1f} ms: "
        f"{100 * result['share_of_step_time']:.2f} % of the time at checkpoint.every={result['checkpoint_every']}"
    )
