"""Do experts divide the text by an attribute? Normalised mutual information with an interval, a control and a rule for claiming it.

The rule: an attribute *specialises* a layer where the p-value is at most LEVEL, adjusted for all layers (the largest statistic) and
all attributes (times their number, Bonferroni), and where the information above the control's is at least LEAST. One study of nothing
claims anything in at most one case of twenty; CONTROLS such studies, of attributes that were shuffled, say how often it did.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float64, Int

from moejax.moe.diagnostics import normalized_mutual_information
from moejax.study import chance
from moejax.study.chance import LEVEL

LEAST = 0.01
"""Of the information there could be, above the control: what many tokens make certain may still be nothing."""
CONTROLS = 100
"""Shuffles that are judged as if they were the text."""
PIECE = 128
"""Most tokens of a piece whose classes are rotated: further apart, a document may have changed its subject."""
Values = Int[np.ndarray, " N"]


class Attribute(NamedTuple):
    """One way to sort tokens."""

    name: str
    kinds: list[str]
    values: Values
    """The kind of every token, or of every document."""
    shuffle: Callable[[Values, np.random.Generator], Values]
    """Values as chance would have them."""
    whole: bool
    """Documents have it."""


@dataclasses.dataclass(frozen=True)
class Finding:
    """One attribute in one layer."""

    attribute: str
    layer: int
    nmi: float
    """Mutual information of attribute and expert over the smaller of their entropies."""
    low: float
    high: float
    """Of its 95 % interval, without the bias of few documents."""
    control: float
    """Its mean over shuffles."""
    above: float
    """(nmi - control) / (1 - control): adjusted for chance (Vinh, Epps and Bailey 2010, JMLR 11)."""
    p: float
    specialised: bool


def of_documents(name: str, kinds: list[str], values: Int[np.ndarray, " D"], sizes: Int[np.ndarray, " D"]) -> Attribute:
    """What whole documents have, a label or a language: shuffled over documents of about a size in tokens."""
    return Attribute(name, kinds, values, lambda values, rng: chance.shuffled_labels(values, sizes, rng), True)


def of_tokens(name: str, kinds: list[str], values: Values, pieces: Values) -> Attribute:
    """What tokens have: rotated within pieces, runs of equal numbers in `pieces`."""
    starts = np.flatnonzero(np.diff(pieces, prepend=pieces[0] - 1))
    lengths = np.diff(np.append(starts, len(pieces)))
    return Attribute(name, kinds, values, lambda values, rng: values[chance.rotation(lengths, rng)], False)


def pieces(rows: Values, documents: Values, positions: Values) -> Values:
    """A number for every run of tokens of one document in one row, of PIECE at most."""
    new = np.ones(len(rows), bool)
    new[1:] = (np.diff(rows) != 0) | (np.diff(documents) != 0) | (np.diff(positions // PIECE) != 0)
    return np.cumsum(new)


def tables(
    values: Values, kinds: int, experts: Int[np.ndarray, "L N K"], width: int, groups: Values | None = None
) -> Int[np.ndarray, "D L kinds X"]:
    """How many assignments of each kind went to each expert, for every group of tokens (all of them in one)."""
    groups = np.zeros_like(values) if groups is None else groups
    number, layers = int(groups.max(initial=0)) + 1, len(experts)
    row = ((groups * kinds + values) * width)[:, None]
    found = [np.bincount((row + own)[own >= 0], minlength=number * kinds * width) for own in experts]
    return np.stack(found).reshape(layers, number, kinds, width).swapaxes(0, 1)


def information(table: np.ndarray) -> Float64[np.ndarray, " L"]:
    """Of every layer of a table [L, kinds, X]."""
    return np.array([normalized_mutual_information(own) for own in table])


def counter(
    attribute: Attribute, experts: Int[np.ndarray, "L N K"], documents: Values, width: int
) -> Callable[[Values], Int[np.ndarray, "L kinds X"]]:
    """Values -> the table of all tokens. What documents have is counted by document once, and then added up."""
    kinds = len(attribute.kinds)
    if not attribute.whole:
        return lambda values: tables(values, kinds, experts, width)[0]
    profile = tables(np.zeros_like(documents), 1, experts, width, documents)[:, :, 0]
    return lambda values: np.tensordot(np.arange(kinds)[:, None] == values, profile, 1).swapaxes(0, 1)


def study(
    attributes: Sequence[Attribute],
    experts: Int[np.ndarray, "L N K"],
    documents: Values,
    document_labels: Int[np.ndarray, " D"],
    width: int,
    draws: int = 999,
    seed: int = 0,
) -> tuple[list[Finding], int]:
    """Every attribute in every layer, from `draws` shuffles and as many draws of documents; and how many of CONTROLS studies of shuffled
    attributes claim anything."""
    rng = np.random.default_rng(seed)
    drawn = chance.weights(document_labels, draws, rng)
    found, false = [], np.zeros(CONTROLS, bool)
    for attribute in attributes:
        count = counter(attribute, experts, documents, width)

        def shuffled(
            number: int, own: Attribute = attribute, count: Callable[[Values], np.ndarray] = count
        ) -> np.ndarray:
            return np.stack([information(count(own.shuffle(own.values, rng))) for _ in range(number)])

        nmi, null = information(count(attribute.values)), shuffled(draws)
        low, high = _interval(attribute, experts, documents, drawn, width)
        above, p, claimed = judged(nmi, null, len(attributes))
        columns = {"nmi": nmi, "low": low, "high": high, "control": null.mean(axis=0), "above": above, "p": p}
        for i in range(len(nmi)):
            numbers = {name: float(column[i]) for name, column in columns.items()}
            found.append(Finding(attribute.name, i, **numbers, specialised=bool(claimed[i])))
        false |= [judged(control, null, len(attributes)).claimed.any() for control in shuffled(CONTROLS)]
    return found, int(false.sum())


class Judged(NamedTuple):
    """Of every layer."""

    above: Float64[np.ndarray, " L"]
    p: Float64[np.ndarray, " L"]
    claimed: Bool[np.ndarray, " L"]


def judged(nmi: Float64[np.ndarray, " L"], null: Float64[np.ndarray, "n L"], attributes: int) -> Judged:
    """The rule, for one of so many attributes, against shuffles of it."""
    control = null.mean(axis=0)
    above = np.where(control < 1, (nmi - control) / np.where(control < 1, 1 - control, 1), 0)
    p = np.minimum(chance.p_values(nmi, null) * attributes, 1)
    return Judged(above, p, (p <= LEVEL) & (above >= LEAST))


def _interval(
    attribute: Attribute, experts: Int[np.ndarray, "L N K"], documents: Values, drawn: np.ndarray, width: int
) -> tuple[Float64[np.ndarray, " L"], Float64[np.ndarray, " L"]]:
    """Over documents; each is a part of the whole table."""
    values = attribute.values[documents] if attribute.whole else attribute.values
    parts = tables(values, len(attribute.kinds), experts, width, documents).astype(np.float64)
    return chance.interval(lambda weights: information(np.tensordot(weights, parts, 1)), drawn, (0.0, 1.0))
