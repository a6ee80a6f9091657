"""What tokens are, beside the label of their document: their class, and where in the row they lie."""

from __future__ import annotations

import itertools

import numpy as np
from jaxtyping import Int

from moejax.data.tokenizer import Tokenizer

CLASSES = ("lower", "upper", "digit", "space", "punctuation", "operator", "non-ascii", "control", "special")
"""Of a token, by the first character of its text that is no space; `special` stands for no text."""
OPERATORS = frozenset("()[]{}<>+-*/=%&|^~@")
"""Brackets among them: what is no letter, digit or mark of prose."""
BINS = 8
"""Equal parts of a row, where it has so many positions."""


def class_of(text: str) -> str:
    """The name in CLASSES of the text of a token; one that only joins words has none."""
    head = text.lstrip()[:1]
    if not head:
        return "space"
    if not head.isascii():
        return "non-ascii"
    if head.isalpha():
        return "lower" if head.islower() else "upper"
    if head.isdigit():
        return "digit"
    if head in OPERATORS:
        return "operator"
    return "punctuation" if head.isprintable() else "control"


def token_classes(tokens: Tokenizer) -> Int[np.ndarray, " V"]:
    """The place in CLASSES of every id. A byte of a character that has several is not ASCII."""
    names = ("special" if tokens.special(i) else class_of(tokens.decode([i])) for i in range(tokens.vocabulary))
    return np.array([CLASSES.index(name) for name in names], np.int64)


def position_bins(positions: Int[np.ndarray, " N"], context: int) -> Int[np.ndarray, " N"]:
    """Which of the parts of a row a position lies in; rows are cut where they fall, so this is no position in a document."""
    return positions.astype(np.int64) * min(BINS, context) // context


def bin_names(context: int) -> list[str]:
    """The first and last position of each part."""
    bins = min(BINS, context)
    edges = (-(-context * i // bins) for i in range(bins + 1))
    return [f"{a}-{b - 1}" for a, b in itertools.pairwise(edges)]
