"""How likely a model finds given tokens: -log p of each in nats, in batches of a few fixed shapes, dropless."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Float, Int

from moejax import config, sharding
from moejax.data import batches
from moejax.data.pipeline import Arrays
from moejax.errors import UserError
from moejax.layers import kinds
from moejax.moe import routers
from moejax.moe.inputs import Mode
from moejax.train import step
from moejax.train.state import Built, TrainState

SHORTEST = 32
"""Positions of the shortest rows; the others double it."""


class Request(NamedTuple):
    """Tokens to score, after tokens that are given."""

    ids: Int[np.ndarray, " n"]
    """The start of a document, what is given, what is scored."""
    first: int
    """Place of the first that is scored; at least 1."""


class Scores(NamedTuple):
    """Of requests, in their order."""

    nats: list[Float[np.ndarray, " n"]]
    """-log p of each scored token."""
    rows: int
    padding_rows: int
    """Rows computed beside them to fill batches; they count nowhere."""


class Scorer:
    """Scores with one model; a program for each length of rows is compiled when it is first met."""

    def __init__(self, built: Built, state: TrainState):
        """Raises UserError where a token's experts depend on other rows, and likelihoods with them."""
        self._built, self._state = built, state
        _require_alone(built.config.model)
        self._score = step.make_score_step(built, state, Mode(training=False, capacity_factor=None))

    def __call__(self, requests: Sequence[Request]) -> Scores:
        """-log p of the tokens of each request from its first scored one on, whatever the requests beside it."""
        for request in requests:
            self._require_fit(request)
        by_length: dict[int, list[int]] = {}
        for i, request in enumerate(requests):
            by_length.setdefault(self._length(len(request.ids) - 1), []).append(i)
        nats: list[np.ndarray] = [np.zeros(0, np.float32)] * len(requests)
        padding = 0
        for length, members in sorted(by_length.items()):
            rows = self._rows(length)
            for start in range(0, len(members), rows):
                chosen = members[start : start + rows]
                found = self._batch([requests[i].ids for i in chosen], length, rows)
                padding += rows - len(chosen)
                for i, row in zip(chosen, found[: len(chosen)], strict=True):
                    nats[i] = row[requests[i].first - 1 : len(requests[i].ids) - 1]
        return Scores(nats, len(requests), padding)

    def _length(self, positions: int) -> int:
        """The least length of rows that holds so many positions: a doubling of what the mesh and the windows of routing divide."""
        cfg: config.Config = self._built.config
        sparse = "sparse" in kinds.channels(cfg.model)
        where = sharding.LAYOUTS[cfg.model.moe.tensor].position if sparse else "position"
        unit = sharding.shards(self._built.mesh, where) * ((cfg.model.moe.group_window or 1) if sparse else 1)
        length = -(-SHORTEST // unit) * unit
        while length < positions:
            length *= 2
        return length

    def _rows(self, length: int) -> int:
        """Rows of a batch: about as many positions as a batch of the run has."""
        cfg: config.Config = self._built.config
        return batches.padded_rows(cfg, self._built.mesh, max(cfg.data.batch * cfg.data.context // length, 1))

    def _batch(self, texts: list[Int[np.ndarray, " _"]], length: int, rows: int) -> Float[np.ndarray, "B T"]:
        mesh: jax.sharding.Mesh = self._built.mesh
        mine = batches.rows_of_host(mesh, rows)
        host = _rows_of(texts[mine], length)
        with jax.set_mesh(mesh):
            return np.asarray(self._score(self._state, batches.put(host, mesh, rows)))

    def _require_fit(self, request: Request) -> None:
        size, (ids, first) = self._built.config.model.vocab_size, request
        if not 1 <= first < len(ids):
            raise UserError(f"first={first} of {len(ids)} tokens: the start is given, and at least one token is scored")
        if ids.min() < 0 or ids.max() >= size:
            raise UserError(f"ids from {ids.min()} to {ids.max()}: the model has {size}; give its own tokenizer")


def _rows_of(texts: list[Int[np.ndarray, " _"]], length: int) -> Arrays:
    """Rows [B, length], one text each from the first position on, the rest invalid."""
    shape = len(texts), length
    tokens, targets, valid = np.zeros(shape, np.int32), np.zeros(shape, np.int32), np.zeros(shape, bool)
    for row, ids in enumerate(texts):
        tokens[row, : len(ids) - 1], targets[row, : len(ids) - 1] = ids[:-1], ids[1:]
        valid[row, : len(ids) - 1] = True
    segments, labels = valid.astype(np.int32), np.zeros(shape, np.int32)
    row_ids = np.arange(len(texts), dtype=np.int32)
    return {
        "tokens": tokens, "targets": targets, "segments": segments, "valid": valid, "labels": labels, "row_ids": row_ids,
    }  # fmt: skip


def _require_alone(model: config.Model) -> None:
    if "sparse" not in kinds.channels(model):
        return
    kind = routers.ROUTERS[model.moe.router]
    if not kind.causal or kind.always_random or model.moe.sinkhorn:
        raise UserError(
            f"model.moe.router={model.moe.router!r}, sinkhorn={model.moe.sinkhorn}: a token's experts depend on later tokens, on other "
            "rows or on chance, so its likelihood is no property of the text; score a model with a causal router"
        )
