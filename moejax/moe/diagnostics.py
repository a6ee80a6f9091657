"""Is routing healthy? NumPy formulas, in float64, on the sums a step returns and on the ids of choices.

L layers, E experts (with zero-computation ids where the sums have them), N tokens, K choices; a table is [labels, E].
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float64, Int, Real

Load = Real[np.ndarray, "L E"]
Table = Real[np.ndarray, "labels E"]
Ids = Int[np.ndarray, "L N K"]


def max_violation(load: Load, targets: Real[np.ndarray, " E"] | None = None) -> Float64[np.ndarray, " L"]:
    """MaxVio: the largest load over its target, less 1 (Wang et al. 2024, "Auxiliary-loss-free load balancing").

    targets: share of the load that each expert is to take, 1/E when not given; experts with target 0 are left out.
    0 where a layer has no load.
    """
    load = np.asarray(load, np.float64)
    targets = np.full(load.shape[1], 1 / load.shape[1]) if targets is None else np.asarray(targets, np.float64)
    load = np.where(targets > 0, load, 0)
    total = load.sum(axis=1)
    return np.where(total > 0, _ratio(load, targets * total[:, None]).max(axis=1) - 1, 0)


def gini(load: Load) -> Float64[np.ndarray, " L"]:
    """sum_ij |n_i - n_j| / (2 E sum_i n_i): 0 at even load, (E-1)/E when one expert has it all, 0 without load."""
    ordered = np.sort(np.asarray(load, np.float64), axis=1)
    experts = ordered.shape[1]
    return _ratio(ordered @ np.arange(1.0 - experts, experts, 2.0), experts * ordered.sum(axis=1))


def load_entropy(load: Load) -> Float64[np.ndarray, " L"]:
    """Entropy of the shares of the load, in nats: log E at even load, 0 without load."""
    load = np.asarray(load, np.float64)
    return _entropy(_ratio(load, load.sum(axis=1, keepdims=True)))


def effective_experts(load: Load) -> Float64[np.ndarray, " L"]:
    """exp of the entropy: as many experts under even load have as much. 1 without load."""
    return np.exp(load_entropy(load))


def dead(load: Load) -> Int[np.ndarray, " L"]:
    """How many experts have no load."""
    return np.count_nonzero(np.asarray(load) == 0, axis=1)


def normalized_mutual_information(table: Table) -> float:
    """Mutual information of label and expert over the smaller of their entropies.

    0: the expert says nothing of the label. 1: one of the two determines the other. 0 where either has one value only.
    """
    table = np.asarray(table, np.float64)
    joint = _ratio(table, table.sum())
    of_label, of_expert = _entropy(joint.sum(axis=1)), _entropy(joint.sum(axis=0))
    ceiling = min(of_label, of_expert)
    if ceiling < 1e-12:
        return 0.0
    return float(np.clip((of_label + of_expert - _entropy(joint.ravel())) / ceiling, 0, 1))


def shuffled(table: Table, seed: int = 0) -> Int[np.ndarray, "labels E"]:
    """A control: as many assignments of each label, their experts drawn without regard to it."""
    of_expert = table.sum(axis=0).astype(np.float64)
    if not of_expert.sum():
        return np.zeros(table.shape, np.int64)
    rng = np.random.default_rng(seed)
    return np.stack([rng.multinomial(int(count), of_expert / of_expert.sum()) for count in table.sum(axis=1)])


def tie(table: Table) -> list[tuple[int, float]]:
    """For each label (expert, share): who takes most of it beyond chance, and how much of the label that is.

    Chance is the expert's share of all labels together. The measure is the difference, not the ratio: an expert with a
    handful of assignments has a large ratio to some label by accident. (-1, 0) for a label that no expert takes more
    of than chance: it is empty, or spread as the whole is.
    """
    table = np.asarray(table, np.float64)
    of_label = table.sum(axis=1, keepdims=True)
    # The difference of shares, times the sizes of the label and of the whole: exact on counts.
    excess = table * table.sum() - of_label * table.sum(axis=0)
    expert = excess.argmax(axis=1)
    share = _ratio(table, of_label)
    return [(int(e), float(share[i, e])) if excess[i, e] > 0 else (-1, 0.0) for i, e in enumerate(expert)]


def duplicates(
    coactivation: Real[np.ndarray, "E E"], load: Real[np.ndarray, " E"], threshold: float = 0.95, least: int = 32
) -> list[tuple[int, int, float]]:
    """Pairs (i, j, overlap), i < j, of experts that nearly always are chosen together, the largest overlap first.

    coactivation: [i, j] tokens that chose both, [i, i] tokens that chose i. Overlap is that of Jaccard, tokens that
    chose both over tokens that chose either: an expert that is always on meets everybody and is nobody's duplicate,
    which a conditional share (co-activation in Muennighoff et al. 2024, OLMoE) does not tell apart.
    Experts with fewer than `least` tokens, chosen or in `load`, are too rare to judge.
    """
    both = np.asarray(coactivation, np.float64)
    chosen = both.diagonal()
    overlap = _ratio(both, chosen[:, None] + chosen - both)
    judged = np.minimum(chosen, load) >= least
    close = np.triu((overlap >= threshold) & judged[:, None] & judged, k=1)
    found = [(int(i), int(j), float(overlap[i, j])) for i, j in np.argwhere(close)]
    return sorted(found, key=lambda pair: -pair[2])


def churn(before: Ids, after: Ids, valid: Bool[np.ndarray, " N"]) -> Float64[np.ndarray, " L"]:
    """Share of the valid tokens whose set of experts changed; ids below 0 are no choice. 0 without valid tokens."""
    shared, larger = _overlap(before, after)
    return _ratio((shared < larger) @ valid.astype(np.float64), valid.sum())


def agreement(before: Ids, after: Ids, valid: Bool[np.ndarray, " N"]) -> Float64[np.ndarray, " L"]:
    """Mean over the valid tokens of |A and B| / K, the share of experts kept (router saturation, Muennighoff et al.
    2024, OLMoE).

    Where choices are missing, K is the size of the larger set, and two empty sets agree: 1 exactly where churn is 0.
    """
    shared, larger = _overlap(before, after)
    kept = np.where(larger > 0, _ratio(shared, larger), 1)
    return kept @ valid.astype(np.float64) / valid.sum() if valid.any() else np.ones(len(kept))


def starved(last_fed: Int[np.ndarray, "L E"], step: int, patience: int) -> list[tuple[int, dict[int, int]]]:
    """The collapse alarm: (layer, {expert: first hungry step}) of each layer with experts unfed for `patience` steps or more.

    last_fed: last step at which an expert had enough load, -1 for never.
    """
    last_fed = np.asarray(last_fed, np.int64)
    hungry = step - last_fed >= patience
    return [
        (int(i), {int(e): int(last_fed[i, e]) + 1 for e in np.flatnonzero(hungry[i])})
        for i in np.flatnonzero(hungry.any(axis=1))
    ]


def _ratio(part: np.ndarray, whole: np.ndarray | np.number) -> np.ndarray:
    """part / whole, 0 where there is nothing."""
    zeros = np.zeros(np.broadcast_shapes(part.shape, whole.shape))
    return np.divide(part, whole, out=zeros, where=whole > 0)


def _entropy(p: np.ndarray) -> np.ndarray | np.floating:
    """sum p log 1/p over the last axis, in nats."""
    return np.sum(p * np.log(1 / np.where(p > 0, p, 1)), axis=-1)


def _overlap(before: np.ndarray, after: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[L,N] sizes: of what two sets of experts share, and of the larger set."""
    before, after = _distinct(before), _distinct(after)
    shared = np.zeros(before.shape[:2], np.int64)
    for k in range(after.shape[2]):
        shared += ((before == after[..., k : k + 1]) & (before >= 0)).sum(axis=2)
    return shared, np.maximum((before >= 0).sum(axis=2), (after >= 0).sum(axis=2))


def _distinct(ids: np.ndarray) -> np.ndarray:
    """Ids of each set in order, -1 in the place of repetitions."""
    ids = np.sort(ids, axis=-1)
    ids[..., 1:][ids[..., 1:] == ids[..., :-1]] = -1
    return ids
