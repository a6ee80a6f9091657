"""Do experts divide the text? How a table of counts, [labels, experts], is shown."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int, Shaped

from moejax.moe import diagnostics

Table = Shaped[np.ndarray, "labels E"]

normalized_information = diagnostics.normalized_mutual_information
shuffled = diagnostics.shuffled


def shares(table: Table) -> Float[np.ndarray, "labels E"]:
    """Of each label's assignments, the share that each expert takes; a label without any has zeros."""
    return table / np.maximum(table.sum(axis=1, keepdims=True), 1)


def order(table: Table) -> Int[np.ndarray, " E"]:
    """Experts by the label they prefer (most above its average share), the strongest preference first."""
    share = shares(table)
    average = table.sum(axis=0) / max(table.sum(), 1)
    lift = share / np.where(average > 0, average, 1)
    return np.lexsort((-lift.max(axis=0), lift.argmax(axis=0)))
