"""What a single expert is good for: how much each label costs without it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from jaxtyping import Bool, Float64, Int

from moejax.study import chance


def effects(
    costs: Float64[np.ndarray, "C D"],
    base: Float64[np.ndarray, " D"],
    sizes: Int[np.ndarray, " D"],
    labels: Int[np.ndarray, " D"],
    kinds: int,
    draws: int = 999,
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """Nats per byte of text more than before, of C removals by label: `effect`, `low` and `high` [C, kinds], and `p`, adjusted for all of
    them; NaN, and p 1, for a label that has no text.

    costs, base: nats of every document with an expert removed, and without. sizes: its bytes. The differences are paired, so what
    makes a document hard cancels. Intervals are of documents drawn anew within their label, p is of signs flipped by document
    (`chance`), on nats per byte of a document, so that no long one decides alone.
    """
    difference = (costs - base).T  # [D, C]
    member: Bool[np.ndarray, "D kinds"] = (labels[:, None] == np.arange(kinds)) & (sizes > 0)[:, None]
    read = sizes @ member

    def per_byte(weights: np.ndarray) -> np.ndarray:
        nats = np.einsum("d,dc,dk->ck", weights, difference, member.astype(np.float64))
        total = (weights * sizes) @ member
        return (nats / np.where(total > 0, total, np.nan)).ravel()

    drawn = chance.weights(labels, draws, np.random.default_rng(seed))
    low, high = chance.interval(per_byte, drawn)
    rate = difference / np.maximum(sizes, 1)[:, None]
    cells = np.broadcast_to(member[:, None, :], (*difference.shape, kinds)).reshape(len(labels), -1)
    rates = np.broadcast_to(rate[:, :, None], (*difference.shape, kinds)).reshape(len(labels), -1)
    p = chance.flipped(rates, cells, draws, seed)
    shape = len(costs), kinds
    found = {"effect": per_byte(np.ones(len(labels))), "low": low, "high": high}
    return {name: x.reshape(shape) for name, x in found.items()} | {"p": np.where(read > 0, p.reshape(shape), 1.0)}


def removed(
    cost: Callable[[int, int], Float64[np.ndarray, " D"]], layers: int, experts: int
) -> Float64[np.ndarray, "C D"]:
    """Nats of every document without each expert of each layer, layer by layer."""
    return np.stack([cost(layer, expert) for layer in range(layers) for expert in range(experts)])
