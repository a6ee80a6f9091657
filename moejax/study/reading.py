"""Labelled rows read by a model: which document, label and place every token has, what it cost, and which experts it went to."""

from __future__ import annotations

from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Float64, Int

from moejax import config
from moejax.data import batches
from moejax.data.pipeline import Arrays, Rows, heldout_batches
from moejax.errors import UserError
from moejax.layers import kinds
from moejax.moe import assignment, routers
from moejax.moe.records import columns
from moejax.moe.replay import Recorded
from moejax.study import forward
from moejax.study.forward import Edit
from moejax.train.state import Built, TrainState


class DocumentRows(Rows):
    """Rows that also say, as `documents` i32[T], the number of each token's document in the split."""

    def __getitem__(self, index: int) -> Arrays:
        first = index * self._context
        found = np.searchsorted(self._offsets, first + np.arange(self._context), side="right") - 1
        return super().__getitem__(index) | {"documents": found.astype(np.int32)}

    def blank(self) -> Arrays:
        return super().blank() | {"documents": np.full(self._context, -1, np.int32)}


class Facts(NamedTuple):
    """Of the N valid tokens of the rows, in their order; documents are numbered from 0 as they are met, D of them."""

    tokens: Int[np.ndarray, " N"]
    labels: Int[np.ndarray, " N"]
    documents: Int[np.ndarray, " N"]
    rows: Int[np.ndarray, " N"]
    positions: Int[np.ndarray, " N"]
    bytes: Int[np.ndarray, " N"]
    """Of text, in the target."""
    document_labels: Int[np.ndarray, " D"]

    @property
    def sizes(self) -> Int[np.ndarray, " D"]:
        """Tokens of every document."""
        return np.bincount(self.documents, minlength=len(self.document_labels))

    def by_document(self, values: np.ndarray) -> Float64[np.ndarray, " D"]:
        """Sums of something of every token."""
        return np.bincount(self.documents, values, len(self.document_labels))


class Answer(NamedTuple):
    """What a model did with the N tokens."""

    nats: Float64[np.ndarray, " N"]
    """-log p of the target."""
    experts: Int[np.ndarray, "L N K"]
    """Reached, in every sparse layer; -1 where there are fewer than K."""


class Reader:
    """Rows on the mesh, and the one program that reads them, whatever is edited."""

    def __init__(self, built: Built, state: TrainState, rows: DocumentRows, limit: int | None):
        """Raises UserError for a model without choices of experts."""
        require_choices(built.config.model)
        self.built, self.label_names = built, rows.label_names
        total = batches.padded_rows(built.config, built.mesh, built.config.data.batch)
        mine = batches.rows_of_host(built.mesh, total)
        self._forward = forward.make(built, state)
        host = list(heldout_batches(rows, total, limit))
        kept = [{name: x[mine] for name, x in b.items() if name != "documents"} for b in host]
        self.batches = [batches.put(b, built.mesh, total) for b in kept]
        self._valid = np.concatenate([b["valid"] for b in host]).ravel()
        self.facts = _facts(host, self._valid)

    def read(self, state: TrainState, edit: Edit | None = None) -> Answer:
        """The rows by the model of `state`, edited."""
        cfg: config.Config = self.built.config
        edit = forward.nothing(cfg.model) if edit is None else edit
        with jax.set_mesh(self.built.mesh):
            found = [self._forward(state, batch, edit) for batch in self.batches]
        shape = found[0][0].shape
        experts = [choices(jax.device_get(recorded), shape, cfg.model.moe) for _, recorded in found]
        nats = np.concatenate([np.asarray(nats, np.float64).ravel() for nats, _ in found])
        return Answer(nats[self._valid], np.concatenate(experts, axis=1)[:, self._valid])

    def nats(self, state: TrainState, edit: Edit) -> Float64[np.ndarray, " N"]:
        """The same without the choices."""
        with jax.set_mesh(self.built.mesh):
            found = [self._forward(state, batch, edit)[0] for batch in self.batches]
        return np.concatenate([np.asarray(nats, np.float64).ravel() for nats in found])[self._valid]


def require_choices(model: config.Model) -> None:
    """Raises UserError where no token goes to an expert."""
    if not kinds.number(model, "sparse") or routers.ROUTERS[model.moe.router].soft:
        raise UserError(
            f"model.pattern={model.pattern} with model.moe.router={model.moe.router!r}: no token chooses an expert, so there is nothing "
            f"to study; give the --workdir of a sparse run with another router than soft"
        )


def choices(recorded: Recorded, shape: tuple[int, int], moe: config.MoE) -> Int[np.ndarray, "L N K"]:
    """The experts that each token of rows [B, T] reached, in the order of the rows; -1 in the place of fewer than K."""
    where = assignment.group(np.arange(shape[0] * shape[1]).reshape(shape), moe)
    layers, groups, width = recorded.expert.shape
    k = width // where.shape[1] if routers.ROUTERS[moe.router].token_choice else columns(moe)
    found = np.full((layers, where.size, k), -1, np.int64)
    token = where[np.arange(groups)[None, :, None], recorded.token]
    for layer, kept in enumerate(recorded.slot != np.iinfo(np.int32).max):
        of, expert = token[layer][kept], recorded.expert[layer][kept]
        order = np.argsort(of, kind="stable")
        of, expert = of[order], expert[order]
        found[layer, of, np.arange(len(of)) - np.searchsorted(of, of)] = expert
    return found


def _facts(host: list[Arrays], valid: np.ndarray) -> Facts:
    whole = {name: np.concatenate([b[name] for b in host]) for name in host[0] if name != "row_ids"}
    rows, positions = np.indices(whole["valid"].shape)
    flat = {name: x.ravel()[valid].astype(np.int64) for name, x in whole.items()}
    if not valid.any():
        raise UserError("the rows hold no target; give more text or more --rows")
    _, first, documents = np.unique(flat["documents"], return_index=True, return_inverse=True)
    size = flat["bytes"] if "bytes" in flat else np.ones_like(flat["tokens"])
    place = rows.ravel()[valid], positions.ravel()[valid]
    return Facts(flat["tokens"], flat["labels"], documents.astype(np.int64), *place, size, flat["labels"][first])
