"""Router saturation: how many of a model's choices an earlier checkpoint made already (Muennighoff et al. 2024, OLMoE, section 5)."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float64, Int

from moejax.moe import diagnostics
from moejax.study import chance

Ids = Int[np.ndarray, "L N K"]


def kept(
    before: Ids, after: Ids, documents: Int[np.ndarray, " N"], drawn: Float64[np.ndarray, "n D"], width: int
) -> dict[str, Float64[np.ndarray, " L"]]:
    """Share of a token's choices that are the same, its interval over documents, and chance.

    Chance is what two routers with these loads share that know nothing of each other: sum over experts of the share of tokens that
    choose it before times after, over the mean number of choices.
    """
    order = np.argsort(documents, kind="stable")
    cuts = np.cumsum(np.bincount(documents, minlength=drawn.shape[1]))[:-1]
    sizes = np.array([len(own) for own in np.split(order, cuts)], np.float64)
    shares = [diagnostics.agreement(before[:, i], after[:, i], np.ones(len(i), bool)) for i in np.split(order, cuts)]
    shared = sizes[:, None] * np.stack(shares)

    def share(weights: np.ndarray) -> np.ndarray:
        return weights @ shared / (weights @ sizes)

    low, high = chance.interval(share, drawn, (0.0, 1.0))
    return {"kept": share(np.ones(len(sizes))), "low": low, "high": high, "chance": _by_chance(before, after, width)}


def _by_chance(before: Ids, after: Ids, width: int) -> Float64[np.ndarray, " L"]:
    def chosen(ids: Ids) -> np.ndarray:
        return np.stack([np.bincount(own[own >= 0], minlength=width) for own in ids]) / ids.shape[1]

    first, second = chosen(before), chosen(after)
    return (first * second).sum(axis=1) / np.maximum(np.maximum(first.sum(axis=1), second.sum(axis=1)), 1e-12)
