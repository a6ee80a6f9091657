"""What a layer may look at beside the residual stream."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moejax import sharding
from moejax.arrays import Batch
from moejax.moe.inputs import Tokens


class Where(NamedTuple):
    """Where queries and keys stand. Of a whole row both are its positions; in decoding keys are those of the cache."""

    queries: Int[Array, "b T"]
    """Of queries, in the row; b is 1 where it is the same in all rows."""
    keys: Int[Array, "1 S"]
    """Of keys, in the row."""
    segments: Int[Array, "B T"]
    """Documents of queries."""
    key_segments: Int[Array, "B S"]


class View(NamedTuple):
    """What a kind of mixer sees; made once a step for all its layers."""

    mask: Bool[Array, "B 1 T S"]
    """Which key a query may see."""
    cosine: Float[Array, "b T half"]
    sine: Float[Array, "b T half"]
    temperature: Float[Array, "B T"] | None
    """Factor on queries."""
    filled: Int[Array, " B"] | None
    """Positions that the cache holds, in decoding."""


class Context(NamedTuple):
    """Made once a step, read by every layer."""

    views: dict[str, View]
    """By the name of the mixer."""
    tokens: Tokens
    key: Array
    """The step's noise key."""
    step: Array
    """Updates made, i32."""


def of_rows(batch: Batch) -> Where:
    """Whole rows. Queries lie where positions do, each with all its keys."""
    index = jnp.arange(batch.segments.shape[1], dtype=jnp.int32)[None]
    keys = jax.reshard(batch.segments, sharding.spec("batch", None))
    return Where(jax.reshard(index, sharding.spec(None, "position")), index, batch.segments, keys)


def of_cache(batch: Batch, filled: Int[Array, " B"], size: int) -> Where:
    """Tokens that come after `filled` others in a cache with room for `size`; each row is one document."""
    rows, positions = batch.tokens.shape
    index = filled[:, None] + jnp.arange(positions, dtype=jnp.int32)[None]
    keys = jax.reshard(jnp.ones((rows, size), jnp.int32), sharding.spec("batch", None))
    index, queries = (jax.reshard(a, sharding.spec("batch", "position")) for a in (index, keys[:, :positions]))
    return Where(index, jnp.arange(size, dtype=jnp.int32)[None], queries, keys)


def visible(where: Where, window: int, chunk: int) -> Bool[Array, "B 1 T S"]:
    """Causal, within documents, and where they are not 0 within a window of positions or a piece of the document."""
    same = where.segments[:, :, None] == where.key_segments[:, None, :]
    query, key = where.queries[:, :, None], where.keys[:, None, :]
    seen = same & ~(query < key)
    if window:
        seen &= query - key < window
    if chunk:
        piece = in_documents(where.key_segments, where.keys) // chunk
        seen &= (of_queries(where) // chunk)[:, :, None] == piece[:, None, :]
    return seen[:, None]


def in_documents(segments: Int[Array, "B S"], index: Int[Array, "1 S"]) -> Int[Array, "B S"]:
    """Positions counted from the start of each document."""
    before = jnp.pad(segments[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    starts = jnp.where(segments != before, index, 0)
    return index - jax.lax.associative_scan(jnp.maximum, starts, axis=1)


def of_queries(where: Where) -> Int[Array, "B T"]:
    """Positions of the queries in their documents."""
    if where.queries.shape[0] != 1:  # of a cache: one document a row
        return where.queries
    return jax.reshard(in_documents(where.key_segments, where.keys), sharding.spec("batch", "position"))


def tokens_of(batch: Batch, where: Where) -> Tokens:
    """Whole rows on every device: a group may be routed from anywhere in its rows."""
    whole = sharding.spec("batch", None)
    valid, labels, ids = (jax.reshard(x, whole) for x in (batch.valid, batch.labels, batch.tokens))
    index = jax.reshard(jnp.broadcast_to(where.queries, batch.tokens.shape), whole)
    return Tokens(valid, labels, batch.row_ids, ids, index)
