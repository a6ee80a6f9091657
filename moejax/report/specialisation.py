"""Do experts divide the text? Formulas on a table of counts, [labels, experts]."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int, Shaped

Table = Shaped[np.ndarray, "labels E"]


def shares(table: Table) -> Float[np.ndarray, "labels E"]:
    """Of each label's assignments, the share that each expert takes; a label without any has zeros."""
    return table / np.maximum(table.sum(axis=1, keepdims=True), 1)


def normalized_information(table: Table) -> float:
    """Mutual information of label and expert over the smaller of their entropies.

    0: the expert says nothing of the label. 1: one of the two determines the other. 0 where either has one value only.
    """
    joint = table / max(table.sum(), 1)
    of_label, of_expert = joint.sum(axis=1), joint.sum(axis=0)
    ceiling = min(_entropy(of_label), _entropy(of_expert))
    if ceiling < 1e-12:
        return 0.0
    return float(np.clip((_entropy(of_label) + _entropy(of_expert) - _entropy(joint)) / ceiling, 0, 1))


def shuffled(table: Table, seed: int = 0) -> Int[np.ndarray, "labels E"]:
    """A control: as many assignments of each label, their experts drawn without regard to it."""
    of_expert = table.sum(axis=0).astype(np.float64)
    if not of_expert.sum():
        return np.zeros(table.shape, np.int64)
    rng = np.random.default_rng(seed)
    return np.stack([rng.multinomial(int(count), of_expert / of_expert.sum()) for count in table.sum(axis=1)])


def order(table: Table) -> Int[np.ndarray, " E"]:
    """Experts by the label they prefer (most above its average share), the strongest preference first."""
    share = shares(table)
    average = table.sum(axis=0) / max(table.sum(), 1)
    lift = share / np.where(average > 0, average, 1)
    return np.lexsort((-lift.max(axis=0), lift.argmax(axis=0)))


def _entropy(probability: Float[np.ndarray, "..."]) -> float:
    """In nats."""
    some = probability[probability > 0]
    return float(-(some * np.log(some)).sum())
