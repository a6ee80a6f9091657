"""What a layer may look at beside the residual stream."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moejax.arrays import Batch
from moejax.moe.layer import Tokens


class Context(NamedTuple):
    """Made once a step, read by every layer."""

    mask: Bool[Array, "B 1 T T"]
    """Which key a query may see: the same document, not later."""
    cosine: Float[Array, "T half"]
    sine: Float[Array, "T half"]
    tokens: Tokens
    key: Array
    """The step's noise key."""
    step: Array
    """Updates made, i32."""


def attention_mask(segments: Int[Array, "B T"]) -> Bool[Array, "B 1 T T"]:
    """Causal, within documents."""
    positions = jnp.arange(segments.shape[1])
    same = segments[:, :, None] == segments[:, None, :]
    return (same & (positions[:, None] >= positions[None, :])[None])[:, None]


def tokens_of(batch: Batch) -> Tokens:
    return Tokens(batch.valid, batch.labels, batch.row_ids, batch.tokens)
