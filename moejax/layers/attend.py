"""Softmax attention over whole rows or a cache, on every device its own rows and heads."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moejax import collectives, sharding


def attend(
    query: Float[Array, "B T H d"],
    key: Float[Array, "B S KV d"],
    value: Float[Array, "B S KV v"],
    mask: Bool[Array, "B 1 T S"],
    *,
    sinks: Float[Array, " H"] | None = None,
    scale: float | None = None,
    queries: int = 0,
) -> Float[Array, "B T H v"]:
    """Every device its rows, heads and queries; keys and values are gathered where positions are cut.

    Args:
      sinks: a logit of each head that takes its share of the softmax and has no value (gpt-oss 2025).
      scale: of the scores; None is 1 / sqrt(d).
      queries: positions of a device whose scores exist at a time, in the backward pass too; 0, or a number that does not divide them,
        takes all.
    """

    def body(query: Array, key: Array, value: Array, mask: Array, sinks: Array | None) -> Array:
        key, value = (collectives.all_gather(a, sharding.axes("position"), axis=1) for a in (key, value))
        width, bias = value.shape[-1], None
        value = jnp.pad(value, ((0, 0),) * 3 + ((0, key.shape[-1] - width),)) if width < key.shape[-1] else value
        if sinks is not None:
            bias = jnp.zeros((1, sinks.shape[0], 1, key.shape[1]), sinks.dtype)
            bias = jnp.concatenate([bias, sinks[None, :, None, None]], axis=-1)
            key, value = (jnp.pad(a, ((0, 0), (0, 1), (0, 0), (0, 0))) for a in (key, value))
            mask = jnp.pad(mask, ((0, 0), (0, 0), (0, 0), (0, 1)), constant_values=True)

        def some(query: Array, mask: Array) -> Array:
            return jax.nn.dot_product_attention(query, key, value, bias=bias, mask=mask, scale=scale)[..., :width]

        return in_turn(some, query, mask, queries)

    heads, masks = sharding.spec("batch", "position", "heads", None), sharding.spec("batch", None, "position", None)
    inputs = (heads, heads, heads, masks, sharding.spec("heads"))
    return jax.shard_map(body, in_specs=inputs, out_specs=heads)(query, key, value, mask, sinks)


def in_turn(
    attended: Callable[[Array, Array], Array], query: Float[Array, "B T H d"], mask: Bool[Array, "B 1 T S"], size: int
) -> Float[Array, "B T H v"]:
    """`attended(query, mask)` of `size` query positions after the other; nothing of one is kept for the backward pass of another."""
    positions = query.shape[1]
    if not size or positions % size or positions == size:
        return attended(query, mask)

    def cut(x: Array, axis: int) -> Array:
        shape = (*x.shape[:axis], positions // size, size, *x.shape[axis + 1 :])
        return jnp.moveaxis(x.reshape(shape), axis, 0)

    parts = jax.lax.map(jax.checkpoint(lambda own: attended(*own), prevent_cse=False), (cut(query, 1), cut(mask, 2)))
    return jnp.moveaxis(parts, 0, 1).reshape(*query.shape[:3], parts.shape[-1])


def stored(
    cache: Float[Array, "B S *rest"], new: Float[Array, "B T *rest"], filled: Int[Array, " B"]
) -> Float[Array, "B S *rest"]:
    """The cache with what is new at the positions from `filled` on, which differ between rows."""
    positions = new.shape[1]
    place = jnp.arange(cache.shape[1], dtype=jnp.int32)[None] - filled[:, None]
    here = (place >= 0) & (place < positions)

    def of_row(old: Array, row: Array, place: Array, here: Array) -> Array:
        taken = jnp.take(row, jnp.clip(place, 0, positions - 1), axis=0)
        return jnp.where(here.reshape(-1, *(1,) * (old.ndim - 1)), taken, old)

    where = jax.typeof(cache).sharding.spec
    rows = sharding.spec("batch", None)
    body = jax.shard_map(jax.vmap(of_row), in_specs=(where, where, rows, rows), out_specs=where)
    return body(cache, jax.reshard(new.astype(cache.dtype), where), place, here)
