"""What watching costs: the default train step that returns its statistics against the same step that returns its loss alone."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from moejax import config
from moejax import mesh as meshes
from moejax.arrays import Batch
from moejax.bench import timing
from moejax.data import batches, prepare
from moejax.data.pipeline import Stream
from moejax.train import state, step

PAIRS = 30


def run(cfg: config.Config, rounds: int) -> dict[str, Any]:
    """Ratio of the two, in pairs run in turn: median, and a 95 % interval of the mean by bootstrap.

    A step whose sums are not returned does not compute what only they need: the compiler removes it. The losses' own sums
    and the routing state stay in both.
    """
    mesh = meshes.make(config.Mesh(), jax.devices()[:1])
    rows = Stream(cfg.data, prepare.ensure(cfg.data))
    with jax.set_mesh(mesh):
        host = next(iter(rows.iterate(0, slice(0, cfg.data.batch))))
        batch = batches.put(host, mesh, cfg.data.batch)
        built = state.build(cfg, mesh)
        now = state.create(built)
        full = step.make_train_step(built, now)

        def unwatched(now: state.TrainState, batch: Batch) -> tuple[state.TrainState, jax.Array]:
            after, sums, _ = full(now, batch)
            return after, sums["nats"]

        calls = {"watched": jax.jit(lambda s, b: full(s, b)[:2]), "unwatched": jax.jit(unwatched)}
        seconds = timing.samples({n: lambda f=f: f(now, batch) for n, f in calls.items()}, rounds)
    ratio = np.asarray(seconds["watched"]) / np.asarray(seconds["unwatched"])
    low, high = interval(ratio)
    return {
        "pairs": rounds,
        "milliseconds": {name: round(1e3 * float(np.median(s)), 3) for name, s in seconds.items()},
        "ratio": {"median": round(float(np.median(ratio)), 4), "mean": round(float(ratio.mean()), 4)},
        "interval_95": [round(low, 4), round(high, 4)],
        "machine": timing.machine(),
    }


def interval(ratio: np.ndarray, draws: int = 10_000) -> tuple[float, float]:
    """95 % interval of the mean ratio: percentiles of the means of resampled pairs."""
    rng = np.random.default_rng(0)
    means = rng.choice(ratio, (draws, len(ratio))).mean(axis=1)
    return float(np.percentile(means, 2.5)), float(np.percentile(means, 97.5))


def table(result: dict[str, Any]) -> str:
    """The numbers for a person."""
    ms, (low, high) = result["milliseconds"], result["interval_95"]
    return (
        f"{result['pairs']} pairs in turn: {ms['watched']:.1f} ms with statistics, {ms['unwatched']:.1f} ms without\n"
        f"ratio {result['ratio']['mean']:.4f} (median {result['ratio']['median']:.4f}), 95 % interval {low:.4f} to {high:.4f}"
    )
