"""A whole study of one checkpoint on labelled rows, as plain numbers that JSON can hold."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float

from moejax import config
from moejax.data.tokenizer import Tokenizer
from moejax.moe.records import columns
from moejax.report import attributes
from moejax.study import ablation, chance, forward, information, saturation, similarity
from moejax.study.information import Attribute
from moejax.study.reading import Answer, DocumentRows, Facts, Reader
from moejax.train import saved
from moejax.train.state import TrainState

Result = dict[str, Any]
REMOVALS: dict[str, Callable[[config.Model, int, int], forward.Edit]] = {
    "forbidden": forward.forbidden,
    "silenced": forward.silenced,
}
PROBES = 256
"""Most vectors on which the outputs of experts are compared."""


class Options(NamedTuple):
    """What is asked of a study."""

    rows: int | None
    """Evenly spaced; None for all."""
    earlier: TrainState | None = None
    """Another checkpoint of the run, whose choices are compared."""
    ablate: tuple[str, ...] = ()
    """Names in REMOVALS."""
    label: str = "label"
    """What the labels are."""
    draws: int = 999
    seed: int = 0


def study(model: saved.Model, rows: DocumentRows, tokens: Tokenizer, options: Options) -> Result:
    """Information with its control, similarity, saturation and ablation of the model's experts on these rows.

    Raises UserError for a model whose tokens choose no expert, and for a router whose experts cannot be forbidden where that is asked.
    """
    cfg: config.Config = model.built.config
    if "forbidden" in options.ablate:
        forward.require_forbidding(cfg.model.moe)
    reader = Reader(model.built, model.state, rows, options.rows)
    answer, facts, names = reader.read(model.state), reader.facts, list(rows.label_names)
    documents = np.bincount(facts.document_labels, minlength=len(names))
    found: Result = {
        "rows": int(facts.rows[-1]) + 1,
        "tokens": len(facts.tokens),
        "documents": dict(zip(names, map(int, documents), strict=True)),
        "draws": options.draws,
        "loss": float(answer.nats.mean()),
    }
    sorts = sorted_by(facts, names, tokens, cfg, options.label)
    found |= _information(sorts, answer, facts, cfg, options)
    found["similarity"] = _similarity(reader, model.state, cfg)
    if options.earlier is not None:
        before = reader.read(options.earlier).experts
        drawn = chance.weights(facts.document_labels, options.draws, np.random.default_rng(options.seed))
        kept = saturation.kept(before, answer.experts, facts.documents, drawn, columns(cfg.model.moe))
        found["saturation"] = _plain(kept)
    if options.ablate:
        found["ablation"] = {name: _ablation(reader, model.state, answer, name, options) for name in options.ablate}
    return found


def sorted_by(facts: Facts, names: list[str], tokens: Tokenizer, cfg: config.Config, label: str) -> list[Attribute]:
    """The ways in which the tokens are sorted: by the label of their document, their class, and their place in the row."""
    of_class = attributes.token_classes(tokens)[facts.tokens]
    pieces = information.pieces(facts.rows, facts.documents, facts.positions)
    bins = attributes.position_bins(facts.positions, cfg.data.context)
    return [
        information.of_documents(label, names, facts.document_labels, facts.sizes),
        information.of_tokens("token class", list(attributes.CLASSES), of_class, pieces),
        information.of_tokens("position", attributes.bin_names(cfg.data.context), bins, facts.rows),
    ]


def _information(
    sorts: Sequence[Attribute], answer: Answer, facts: Facts, cfg: config.Config, options: Options
) -> Result:
    """Findings, what the same study claims of shuffled attributes, and the tables [layers, kinds, experts] they are of."""
    text = answer.experts, facts.documents
    width = columns(cfg.model.moe)
    findings, false = information.study(sorts, *text, facts.document_labels, width, options.draws, options.seed)
    return {
        "attributes": {s.name: s.kinds for s in sorts},
        "information": [dataclasses.asdict(finding) for finding in findings],
        "controls": {"studies": information.CONTROLS, "claiming": false},
        "tables": _plain({s.name: information.counter(s, *text, width)(s.values) for s in sorts}),
    }


def _similarity(reader: Reader, state: TrainState, cfg: config.Config) -> Result:
    """Of every layer: cosines of outputs and of weights, and twins."""
    x = _probes(reader, state)
    channels = similarity.of_layers(state.parameters, cfg.model)
    given = zip(channels, x, strict=True)
    outputs = [similarity.by_outputs(similarity.outputs(own, z, cfg.model.moe)) for own, z in given]
    twins = [[i, *pair] for i, own in enumerate(outputs) for pair in similarity.twins(own)]
    return {"outputs": _plain(outputs), "weights": _plain([similarity.by_weights(c) for c in channels]), "twins": twins}


def _probes(reader: Reader, state: TrainState) -> Float[np.ndarray, "L P D"]:
    """Vectors of valid tokens of the first batch, evenly spaced, as each sparse layer is given them."""
    with jax.set_mesh(reader.built.mesh):
        given, where = forward.make_inputs(reader.built, state)(state, reader.batches[0])
    valid = np.flatnonzero(np.asarray(where))
    chosen = valid[np.arange(min(PROBES, len(valid))) * len(valid) // min(PROBES, len(valid))]
    return np.asarray(given, np.float32).reshape(len(given), -1, given.shape[-1])[:, chosen]


def _ablation(reader: Reader, state: TrainState, answer: Answer, name: str, options: Options) -> Result:
    """Effects [layers, experts, labels] of removing one expert at a time."""
    model, facts = reader.built.config.model, reader.facts
    layers, experts = forward.nothing(model).kept.shape

    def cost(layer: int, expert: int) -> np.ndarray:
        return facts.by_document(reader.nats(state, REMOVALS[name](model, layer, expert)))

    base, sizes = facts.by_document(answer.nats), facts.by_document(facts.bytes).astype(np.int64)
    labels, kinds = facts.document_labels, len(reader.label_names)
    costs = ablation.removed(cost, layers, experts)
    effects = ablation.effects(costs, base, sizes, labels, kinds, options.draws, options.seed)
    return _plain({key: x.reshape(layers, experts, kinds) for key, x in effects.items()})


def _plain(tree: Any) -> Any:
    """Arrays as lists; NaN, which JSON has not, as None."""

    def listed(x: np.ndarray) -> list:
        numbers = x.astype(object)
        numbers[x != x] = None
        return numbers.tolist()

    return jax.tree.map(listed, tree)
