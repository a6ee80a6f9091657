"""Mixers: what moves information between positions."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from moejax import collectives, config, sharding
from moejax.errors import ConfigError
from moejax.layers import init
from moejax.layers.context import Context
from moejax.layers.positions import rotate


class GroupedQueryAttention(nnx.Module):
    """Causal attention within documents, key and value heads shared by groups of query heads (Ainslie et al. 2023)."""

    def __init__(self, model: config.Model, *, rngs: nnx.Rngs):
        d, h, kv, dim = model.width, model.heads, model.kv_heads, model.head_dim
        depth = model.repeats * len(model.pattern)
        self.query = init.normal(rngs, (d, h, dim), ("storage", "heads", None), fan_in=d)
        self.key = init.normal(rngs, (d, kv, dim), ("storage", "heads", None), fan_in=d)
        self.value = init.normal(rngs, (d, kv, dim), ("storage", "heads", None), fan_in=d)
        self.out = init.normal(rngs, (h, dim, d), ("heads", None, "storage"), fan_in=h * dim, gain=(2 * depth) ** -0.5)

    def __call__(self, x: Float[Array, "B T D"], context: Context) -> Float[Array, "B T D"]:
        query, key, value = (
            jnp.einsum("btd,dhk->bthk", x, sharding.gather(w, x.dtype)) for w in (self.query, self.key, self.value)
        )
        query = rotate(query, context.cosine, context.sine)
        key = rotate(key, context.cosine, context.sine)
        y = attend(query, key, value, context.mask)
        out = sharding.spec("batch", "position", None)
        return jnp.einsum("bthk,hkd->btd", y, sharding.gather(self.out, x.dtype), out_sharding=out)


def attend(
    query: Float[Array, "B T H d"],
    key: Float[Array, "B T KV d"],
    value: Float[Array, "B T KV d"],
    mask: Bool[Array, "B 1 T T"],
) -> Float[Array, "B T H d"]:
    """Every device its rows, heads and queries; keys and values are gathered where positions are cut."""

    def body(query: Array, key: Array, value: Array, mask: Array) -> Array:
        key, value = (collectives.all_gather(a, sharding.axes("position"), axis=1) for a in (key, value))
        return jax.nn.dot_product_attention(query, key, value, mask=mask)

    heads, queries = sharding.spec("batch", "position", "heads", None), sharding.spec("batch", None, "position", None)
    return jax.shard_map(body, in_specs=(heads, heads, heads, queries), out_specs=heads)(query, key, value, mask)


def check(model: config.Model) -> None:
    """The rules of attention."""
    if min(model.heads, model.kv_heads) < 1 or model.heads % model.kv_heads:
        raise ConfigError(
            f"model.heads={model.heads} and model.kv_heads={model.kv_heads}: each key and value head serves a whole "
            f"number of query heads; choose kv_heads from the divisors of {model.heads}"
        )
    if model.head_dim < 2 or model.head_dim % 2:
        raise ConfigError(f"model.head_dim={model.head_dim}: rotary positions turn pairs; choose an even number")
