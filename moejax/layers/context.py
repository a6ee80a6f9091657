"""What a layer may look at beside the residual stream."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moejax import sharding
from moejax.arrays import Batch
from moejax.moe.inputs import Tokens


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
    """Causal, within documents. Queries lie where positions do, each with all its keys."""
    positions = jnp.arange(segments.shape[1])
    keys = jax.reshard(segments, sharding.spec("batch", None))
    same = segments[:, :, None] == keys[:, None, :]
    later = jax.reshard(positions[:, None] < positions[None, :], sharding.spec("position", None))
    return (same & ~later[None])[:, None]


def tokens_of(batch: Batch) -> Tokens:
    """Whole rows on every device: a group may be routed from anywhere in its rows."""
    whole = sharding.spec("batch", None)
    valid, labels, ids = (jax.reshard(x, whole) for x in (batch.valid, batch.labels, batch.tokens))
    return Tokens(valid, labels, batch.row_ids, ids)
