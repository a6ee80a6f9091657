"""Held-out sums: every row in order, dropless; with a capacity as well where the config asks for it."""

from __future__ import annotations

from typing import Any

import jax

from moejax import config
from moejax.data import batches
from moejax.data.pipeline import Rows, heldout_batches
from moejax.train import metrics, step
from moejax.train.losses import Sums
from moejax.train.metrics import Numbers
from moejax.train.state import Built, TrainState


class Evaluator:
    """The evaluation steps of one run, compiled once."""

    def __init__(self, built: Built, state: TrainState, rows: Rows):
        self._built, self._rows = built, rows
        factors: dict[str, float | None] = {"": None}
        if built.config.model.moe.eval_capacity_factor is not None:
            factors["_capacity"] = built.config.model.moe.eval_capacity_factor
        kinds = len(rows.label_names)
        self._steps = {name: step.make_eval_step(built, state, factor, kinds) for name, factor in factors.items()}

    def run(self, parameters: Any, limit: int | None, prefix: str) -> tuple[Numbers, Sums]:
        """Numbers named `prefix/…` (and `prefix_capacity/…`), and the sums of the dropless pass."""
        numbers: Numbers = {}
        sums: dict[str, Sums] = {}
        for name, evaluate in self._steps.items():
            total: Sums | None = None
            for batch in self._batches(limit):
                total = metrics.add(total, metrics.to_host(evaluate(parameters, batch)))
            assert total is not None
            numbers |= metrics.of_evaluation(total, self._rows.label_names, f"{prefix}{name}")
            sums[name] = total
        return numbers, sums[""]

    def _batches(self, limit: int | None):
        cfg: config.Config = self._built.config
        mesh: jax.sharding.Mesh = self._built.mesh
        total = batches.padded_rows(cfg, mesh, cfg.data.batch)
        mine = batches.rows_of_host(mesh, total)
        for host in heldout_batches(self._rows, total, limit):
            yield batches.put({name: value[mine] for name, value in host.items()}, mesh, total)
