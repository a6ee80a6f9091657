"""Grouped-query attention with the options of published models: biases, norms of queries and keys, windows, sinks, temperatures."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from moejax import config, sharding
from moejax.errors import ConfigError
from moejax.layers import context, init, norms, positions
from moejax.layers.attend import attend, stored
from moejax.layers.context import View, Where

Cache = dict[str, Array]
"""What a mixer keeps of the positions before, [B, S, ...] by name; empty where nothing is kept."""

NORMS: dict[str, tuple[int, ...]] = {"none": (), "head": (-1,), "whole": (-2, -1), "l2": ()}
"""Axes of [B, T, H, d] that a learned norm of queries and keys is over."""


class GroupedQueryAttention(nnx.Module):
    """Causal attention within documents, key and value heads shared by groups of query heads (Ainslie et al. 2023)."""

    def __init__(self, model: config.Model, options: config.Attention, *, rngs: nnx.Rngs):
        d, h, kv, dim = model.width, model.heads, model.kv_heads, model.head_dim
        gain = (2 * config.depth(model)) ** -0.5
        self.options, self.epsilon, self.interleaved = options, model.norm_epsilon, model.rope.interleaved
        self.queries = model.query_chunk
        self.query = init.normal(rngs, (d, h, dim), ("storage", "heads", None), fan_in=d)
        self.key = init.normal(rngs, (d, kv, dim), ("storage", "heads", None), fan_in=d)
        self.value = init.normal(rngs, (d, kv, dim), ("storage", "heads", None), fan_in=d)
        self.out = init.normal(rngs, (h, dim, d), ("heads", None, "storage"), fan_in=h * dim, gain=gain)
        heads = {"query": h, "key": kv, "value": kv}
        bias = {f"{name}_bias": init.zeros((n, dim), ("heads", None)) for name, n in heads.items() if options.bias}
        self.query_bias, self.key_bias, self.value_bias = (bias.get(f"{name}_bias") for name in heads)
        self.out_bias = init.zeros((d,), (None,)) if options.out_bias else None
        self.query_norm, self.key_norm = (self._norm(n, dim) for n in (h, kv))
        self.sinks = init.zeros((h,), ("heads",)) if options.sinks else None

    def _norm(self, heads: int, dim: int) -> nnx.Param | None:
        shapes = {(-1,): ((dim,), (None,)), (-2, -1): ((heads, dim), ("heads", None))}
        axes = NORMS[self.options.norm]
        return init.ones(*shapes[axes]) if axes else None

    def __call__(self, x: Float[Array, "B T D"], view: View, cache: Cache) -> tuple[Float[Array, "B T D"], Cache]:
        """The output, and the cache with these positions; an empty cache stays empty."""
        query = self._ready(self._project(x, self.query, self.query_bias), self.query_norm, view)
        key = self._ready(self._project(x, self.key, self.key_bias), self.key_norm, view)
        value = self._project(x, self.value, self.value_bias)
        if view.temperature is not None:
            query = (query * view.temperature[:, :, None, None]).astype(x.dtype)
        if cache:
            assert view.filled is not None
            key, value = stored(cache["key"], key, view.filled), stored(cache["value"], value, view.filled)
            cache = {"key": key, "value": value}
        sinks = None if self.sinks is None else sharding.whole(self.sinks)
        y = attend(query, key.astype(x.dtype), value.astype(x.dtype), view.mask, sinks=sinks, queries=self.queries)
        out = sharding.spec("batch", "position", None)
        y = jnp.einsum("bthk,hkd->btd", y, sharding.gather(self.out, x.dtype), out_sharding=out)
        return (y if self.out_bias is None else y + sharding.whole(self.out_bias, x.dtype)[None, None]), cache

    def _project(self, x: Array, weight: nnx.Param, bias: nnx.Param | None) -> Float[Array, "B T H d"]:
        y = jnp.einsum("btd,dhk->bthk", x, sharding.gather(weight, x.dtype))
        return y if bias is None else y + sharding.whole(bias, x.dtype)[None, None]

    def _ready(self, x: Float[Array, "B T H d"], scale: nnx.Param | None, view: View) -> Float[Array, "B T H d"]:
        """Queries or keys, normed and turned."""
        if scale is not None:
            whole = sharding.whole(scale)
            whole = whole[None, None] if whole.ndim == 2 else whole[None, None, None]
            x = (norms.unit(x, self.epsilon, NORMS[self.options.norm]) * whole).astype(x.dtype)
        if self.options.rotary:
            x = positions.rotate(x, view.cosine, view.sine, self.interleaved)
        return norms.unit(x, self.epsilon).astype(x.dtype) if self.options.norm == "l2" else x


def view(model: config.Model, options: config.Attention, where: Where, filled: Array | None) -> View:
    """What layers with these options see."""
    turning = round(model.rope.fraction * model.head_dim)
    turn = positions.angles(where.queries, model.rope, model.rope_theta, turning)
    temperature = None
    if options.temperature:
        turns = (context.of_queries(where) + 1) // options.temperature_positions
        temperature = 1 + options.temperature * jnp.log1p(turns.astype(jnp.float32))
    return View(context.visible(where, options.window, options.chunk), *turn, temperature, filled)


def cache(model: config.Model, rows: int, size: int, dtype: jnp.dtype) -> Cache:
    """Zeros with room for `size` positions."""
    where = sharding.spec("batch", "position", "heads", None)
    shape = rows, size, model.kv_heads, model.head_dim
    return {name: jax.reshard(jnp.zeros(shape, dtype), where) for name in ("key", "value")}


def check(model: config.Model, options: config.Attention, name: str) -> None:
    """The rules of attention; `name` is the section's."""
    if min(model.heads, model.kv_heads) < 1 or model.heads % model.kv_heads:
        raise ConfigError(
            f"model.heads={model.heads} and model.kv_heads={model.kv_heads}: each key and value head serves a whole "
            f"number of query heads; choose kv_heads from the divisors of {model.heads}"
        )
    if model.head_dim < 2 or model.head_dim % 2:
        raise ConfigError(f"model.head_dim={model.head_dim}: rotary positions turn pairs; choose an even number")
    turning = model.rope.fraction * model.head_dim
    if turning != round(turning) or round(turning) % 2 or turning < 2:
        raise ConfigError(
            f"model.rope.fraction={model.rope.fraction} of model.head_dim={model.head_dim} is {turning:g} dimensions: choose a share "
            f"that leaves an even number"
        )
    if options.norm not in NORMS:
        raise ConfigError(f"model.{name}.norm={options.norm!r}: choose one of {', '.join(NORMS)}")
    if min(options.window, options.chunk, options.temperature) < 0 or options.temperature_positions < 1:
        raise ConfigError(
            f"model.{name}.window={options.window}, chunk={options.chunk}, temperature={options.temperature}, temperature_positions="
            f"{options.temperature_positions}: none is negative, and the last at least 1"
        )
