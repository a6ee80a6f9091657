"""Options of hyperparameters that were tuned on a smaller model: the section `transfer` of a config."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Transfer:
    """Rules that initial values and learning rates follow, and the sizes at which they change nothing: those of the model that was tuned. A
    size of 0 is the model's own."""

    rules: str = "none"
    """A name in moejax.layers.transfer.RULES: none, or mup."""
    width: int = 0
    """D, width of the residual stream."""
    heads: int = 0
    """H, query heads; their head_dim is the model's own."""
    hidden: int = 0
    """Hidden width of a dense feed-forward layer."""
    expert_hidden: int = 0
    """F, hidden width of one expert."""
    shared_hidden: int = 0
    """Hidden width of the shared expert."""
    expert_latent: int = 0
    """Width the routed experts work in, where it is not the model's."""
    latent_rank: int = 0
    """Width of the vector that latent attention makes keys and values from."""
    query_rank: int = 0
    """Width of the vector that latent attention makes queries from."""
