"""Held-out sums: every row in order, dropless; with a capacity as well where the config asks for it. And the fixed probe."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import jax
import numpy as np

from moejax import config
from moejax.arrays import Batch
from moejax.data import batches
from moejax.data.pipeline import Arrays, Rows, heldout_batches
from moejax.moe import assignment, routers
from moejax.moe.inputs import Mode
from moejax.train import metrics, step
from moejax.train.losses import Sums
from moejax.train.metrics import Numbers
from moejax.train.state import Built, TrainState


class StoppedError(Exception):
    """An evaluation that was cut short because the run must stop."""


class Evaluator:
    """The evaluation steps of one run, compiled once."""

    def __init__(self, built: Built, state: TrainState, rows: Rows):
        self._built, self._rows = built, rows
        moe, kinds = built.config.model.moe, len(rows.label_names)
        # A router without a dropless form keeps the capacity it is trained with.
        dropless = moe.capacity_factor if routers.ROUTERS[moe.router].bounded else None
        modes = {"": Mode(training=False, capacity_factor=dropless, label_kinds=kinds)}
        if moe.eval_capacity_factor is not None:
            modes["_capacity"] = Mode(training=False, capacity_factor=moe.eval_capacity_factor, label_kinds=kinds)
        self._steps = {name: step.make_eval_step(built, state, mode) for name, mode in modes.items()}
        self._probe = step.make_eval_step(built, state, Mode(training=False, capacity_factor=dropless, record=True))

    def run(
        self, state: TrainState, limit: int | None, prefix: str, stop: Callable[[], bool] = lambda: False
    ) -> tuple[Numbers, Sums]:
        """Numbers named `prefix/…` (and `prefix_capacity/…`), and the sums of the dropless pass. Raises StoppedError where `stop`, asked
        after each batch, says so."""
        numbers: Numbers = {}
        sums: dict[str, Sums] = {}
        for name, evaluate in self._steps.items():
            total: Sums | None = None
            for _, batch in self._batches(limit):
                total = metrics.add(total, metrics.to_host(evaluate(state, batch)[0]))
                if stop():
                    raise StoppedError
            assert total is not None
            numbers |= metrics.of_evaluation(
                total, self._built.config.model.moe, self._rows.label_names, f"{prefix}{name}"
            )
            sums[name] = total
        return numbers, sums[""]

    def probe(self, state: TrainState) -> dict[str, np.ndarray]:
        """Experts of the first `data.batch` held-out rows, the same at every evaluation and on every mesh: experts [layers, tokens,
        choices], -1 where there is none; and tokens, labels, rows, positions, valid [tokens]. Empty where choices do not lie token by
        token, or nothing is sparse."""
        cfg: config.Config = self._built.config
        moe = cfg.model.moe
        host, batch = next(self._batches(None))
        _, recorded = self._probe(state, batch)
        if not recorded or not routers.ROUTERS[moe.router].token_choice:
            return {}
        routed = metrics.to_host(recorded["sparse"])
        rows, positions = np.indices((cfg.data.batch, cfg.data.context), np.int32)
        facts = {name: host[name][: cfg.data.batch] for name in ("tokens", "labels", "valid")}
        facts |= {"rows": rows, "positions": positions}
        facts = {name: assignment.group(x, moe).reshape(-1) for name, x in facts.items()}
        chosen = np.where(routed.asked, routed.expert, -1)[:, : assignment.group(rows, moe).shape[0]]
        experts = chosen.reshape(len(chosen), rows.size, -1)
        return {"experts": experts.astype(np.int32), **facts}

    def _batches(self, limit: int | None) -> Iterator[tuple[Arrays, Batch]]:
        """The rows, and those of them that are this process's on the mesh."""
        cfg: config.Config = self._built.config
        mesh: jax.sharding.Mesh = self._built.mesh
        total = batches.padded_rows(cfg, mesh, cfg.data.batch)
        mine = batches.rows_of_host(mesh, total)
        for host in heldout_batches(self._rows, total, limit):
            yield host, batches.put({name: value[mine] for name, value in host.items()}, mesh, total)
