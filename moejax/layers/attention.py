"""Mixers: what moves information between positions."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from moejax import config, sharding
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
        y = jax.nn.dot_product_attention(query, key, value, mask=context.mask)
        return jnp.einsum("bthk,hkd->btd", y, sharding.gather(self.out, x.dtype))


def check(model: config.Model) -> None:
    """The rules of attention."""
    if min(model.heads, model.kv_heads) < 1 or model.heads % model.kv_heads:
        raise ConfigError(
            f"model.heads={model.heads} and model.kv_heads={model.kv_heads}: each key and value head serves a whole "
            f"number of query heads; choose kv_heads from the divisors of {model.heads}"
        )
    if model.head_dim < 2 or model.head_dim % 2:
        raise ConfigError(f"model.head_dim={model.head_dim}: rotary positions turn pairs; choose an even number")
