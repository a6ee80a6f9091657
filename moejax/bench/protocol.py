"""One short run of the default experiment for each of many settings: what routers and balancers are compared by."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from moejax import config
from moejax.report import runs
from moejax.train import check, loop

FOLDER = Path("runs/bench")
"""Where the runs are kept: a bench that was stopped goes on. Delete it to measure other code."""

STEPS = 200
"""Long enough for routers to part ways, short enough for about a minute on two cores."""


def setting(cfg: config.Config, name: str, options: Mapping[str, Any]) -> config.Config:
    """The experiment with these options of the sparse layer, checked."""
    model = dataclasses.replace(cfg.model, moe=dataclasses.replace(cfg.model.moe, **options))
    train = dataclasses.replace(
        cfg.train, steps=STEPS, warmup=20, log_every=10, eval_every=100, eval_rows=256, routing_every=STEPS
    )
    kept = dataclasses.replace(cfg.checkpoint, every=STEPS, keep=1)
    found = dataclasses.replace(cfg, name=name, model=model, train=train, checkpoint=kept)
    check.check(found)
    return found


def trial(cfg: config.Config, folder: Path) -> dict[str, Any]:
    """Trains in `folder`/NAME if that is not done yet, and reads off what the tables show.

    bits_per_byte: all held-out rows, dropless where the router has such a form. drop_rate, max_violation, requests_per_token:
    means over the logged training steps of the second half. load: [layers, columns], shares of the held-out load.
    """
    folder = folder / re.sub(r"\W+", "_", cfg.name)
    if not (folder / "routing" / "heldout.npz").exists():
        loop.train(cfg, str(folder), quiet=True)
    run = runs.load(folder)

    def late(name: str) -> float:
        value = run.curves[name].value
        return round(float(np.mean(value[len(value) // 2 :])), 5)

    load = run.routing["sparse"]["load"].astype(np.float64)
    curve = run.curves["train/bits_per_byte"]
    return {
        "bits_per_byte": round(run.heldout["heldout/bits_per_byte"], 4),
        "drop_rate": late("moe/drop_rate"),
        "max_violation": late("moe/max_violation"),
        "requests_per_token": late("moe/requests_per_token"),
        "entropy": late("moe/entropy"),
        "dead": int((load == 0).sum()),
        "load": np.round(load / np.maximum(load.sum(axis=1, keepdims=True), 1), 4).tolist(),
        "curve": [[int(s), round(float(v), 4)] for s, v in zip(curve.step, curve.value, strict=True)],
    }
