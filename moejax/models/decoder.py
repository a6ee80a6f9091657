"""A decoder: tokens -> final hidden vectors. Blocks of layers are scanned; a layer is a mixer and a channel part."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from moejax import config, sharding
from moejax.arrays import Batch
from moejax.errors import ConfigError
from moejax.layers import attention, init, kinds
from moejax.layers import context as ctx
from moejax.layers.feed_forward import Outcome, Side
from moejax.layers.norms import RMSNorm
from moejax.models import depth, further, lookup, remat
from moejax.moe.inputs import Mode
from moejax.moe.records import State
from moejax.moe.replay import Recorded

Routing = dict[str, State]
"""State of the layers of each kind of channel, stacked in order of depth."""
Recordings = dict[str, Recorded]


class Cache(NamedTuple):
    """What decoding keeps of the positions before."""

    first: list[attention.Cache]
    """Of every layer of `model.first`."""
    blocks: list[attention.Cache]
    """Of every layer of the pattern, [repeats, ...]."""
    filled: Int[Array, " B"]
    """Positions of each row that are there."""


class Layer(nnx.Module):
    """x += mixer(norm(x)); x += channel(norm(x))."""

    def __init__(self, model: config.Model, kind: str, *, rngs: nnx.Rngs):
        self.kind, channel = kinds.split(kind)
        self.mixer_norm = RMSNorm(model.width, model.norm_epsilon)
        self.mixer = kinds.MIXERS[self.kind].make(model, rngs)
        self.channel_norm = RMSNorm(model.width, model.norm_epsilon)
        self.channel = kinds.CHANNELS[channel](model, rngs=rngs)

    def __call__(
        self, x: Array, context: ctx.Context, layer: Array, mode: Mode, side: Side, cache: attention.Cache
    ) -> tuple[Array, Outcome, attention.Cache]:
        with jax.named_scope("mixer"):
            y, cache = self.mixer(self.mixer_norm(x), context.views[self.kind], cache)
            x = x + y
        with jax.named_scope("channel"):
            y, outcome = self.channel(self.channel_norm(x), context, layer, mode, side)
        return x + y, outcome, cache


class Block(nnx.Module):
    """The layers of one turn of the scan."""

    def __init__(self, model: config.Model, *, rngs: nnx.Rngs):
        self.layers = nnx.List([Layer(model, kind, rngs=rngs) for kind in model.pattern])


class Forward(NamedTuple):
    """Of whole rows."""

    hidden: Float[Array, "B T D"]
    """Final hidden vectors."""
    outcomes: dict[str, Outcome]
    """What each kind of channel reports, stacked over its layers in order of depth, those of further modules last."""
    further: list[tuple[Float[Array, "B T D"], Batch]]
    """Of every module that predicts a further token: hidden vectors, and what they are to predict where."""


class Decoder(nnx.Module):
    """Embedding, blocks stacked for the scan, final norm, and the output projection that the loss reads in chunks."""

    def __init__(self, model: config.Model, *, rngs: nnx.Rngs):
        self.model = model
        v, d = model.vocab_size, model.width
        self.embedding = init.normal(rngs, (v, d), (None, "storage"), fan_in=1, decay=False, role="embedding")
        keys = jax.random.split(rngs.params(), model.repeats)
        self.blocks = jax.lax.map(lambda key: Block(model, rngs=nnx.Rngs(key)), keys)
        self.final_norm = RMSNorm(d, model.norm_epsilon)
        self.unembedding = init.normal(rngs, (d, v), ("storage", None), fan_in=d, role="output")
        self.first = nnx.List([Layer(model, kind, rngs=rngs) for kind in model.first])
        layers = (Layer(model, kind, rngs=rngs) for kind in kinds.further(model))
        self.further = nnx.List([further.Module(model, layer, rngs=rngs) for layer in layers])

    def __call__(
        self, batch: Batch, key: Array, mode: Mode, routing: Routing, step: Array, recorded: Recordings | None = None
    ) -> Forward:
        """`routing` is the state of every kind of channel, `recorded` routing to play back, both stacked like the outcomes; `step` the
        updates made."""
        where = ctx.of_rows(batch)
        context = ctx.Context(self._views(where, None), ctx.tokens_of(batch, where), key, step)
        states, plays = depth.parted(self.model, routing, {}), depth.parted(self.model, recorded)
        sides = depth.Parts(*([Side(*p) for p in zip(s, r, strict=True)] for s, r in zip(states, plays, strict=True)))
        x, outcomes, _ = self._layers(self._embed(batch.tokens), context, mode, sides, no_cache(self.model))
        last, found, hidden = [], [], x
        for i, (module, side) in enumerate(zip(self.further, sides.further, strict=True)):
            own = further.of_depth(batch, i + 1)
            context = context._replace(tokens=ctx.tokens_of(own, where))
            hidden = module.joined(hidden, self._embed(own.tokens))
            number = jnp.int32(config.depth(self.model) + i)
            hidden, outcome, _ = self._one(context, mode, scanned=False)(hidden, number, module.layer, side, {})
            found.append((module.final_norm(hidden), own))
            last.append(outcome)
        outcomes = depth.joined(self.model, depth.Parts(outcomes.first, outcomes.blocks, last))
        return Forward(self.final_norm(x), outcomes, found)

    def decode(
        self, batch: Batch, key: Array, mode: Mode, routing: Routing, step: Array, cache: Cache
    ) -> tuple[Float[Array, "B T D"], Cache]:
        """Final hidden vectors of tokens that follow those of the cache, and the cache with them; `filled` counts the valid ones, which
        come first in each row. Positions may not lie over several devices."""
        size = jax.tree.leaves(cache.first + [jax.tree.map(lambda x: x[0], cache.blocks)])[0].shape[1]
        where = ctx.of_cache(batch, cache.filled, size)
        context = ctx.Context(self._views(where, cache.filled), ctx.tokens_of(batch, where), key, step)
        sides = depth.Parts(*([Side(s, None) for s in states] for states in depth.parted(self.model, routing, {})))
        x, _, cache = self._layers(self._embed(batch.tokens), context, mode, sides, cache)
        filled = cache.filled + jnp.sum(batch.valid, axis=1, dtype=jnp.int32)
        return self.final_norm(x), cache._replace(filled=filled)

    def logits(self, hidden: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """fp32."""
        weight = sharding.gather(self.unembedding, hidden.dtype)
        where = sharding.spec("batch", "position", None)
        return jnp.einsum("btd,dv->btv", hidden, weight, preferred_element_type=jnp.float32, out_sharding=where)

    def _views(self, where: ctx.Where, filled: Array | None) -> dict[str, ctx.View]:
        return {name: kinds.MIXERS[name].view(self.model, where, filled) for name in kinds.mixers(self.model)}

    def _embed(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        return lookup.embedded(self.embedding, tokens, jnp.dtype(self.model.compute_dtype))

    def _one(self, context: ctx.Context, mode: Mode, *, scanned: bool) -> Callable:
        """(x, number, layer, side, cache) -> x, outcome and cache of a layer, of which the backward pass recomputes what the model says."""

        def one(x: Array, number: Array, layer: Layer, side: Side, own: attention.Cache) -> tuple:
            return layer(x, context, number, mode, side, own)

        return remat.wrap(one, self.model.remat, scanned=scanned)

    def _layers(
        self, x: Float[Array, "B T D"], context: ctx.Context, mode: Mode, sides: depth.Parts, cache: Cache
    ) -> tuple[Float[Array, "B T D"], depth.Parts, Cache]:
        """Through all layers but those of further modules: the residual stream, outcomes, and the cache."""
        model = self.model

        def through(
            x: Array, layers: tuple, *, scanned: bool
        ) -> tuple[Array, tuple[list[Outcome], list[attention.Cache]]]:
            own_layers, number, own_sides, caches = layers
            one = self._one(context, mode, scanned=scanned)
            outcomes, kept = [], []
            for i, parts in enumerate(zip(own_layers, own_sides, caches, strict=True)):
                x, outcome, own = one(x, number + i, *parts)
                outcomes.append(outcome)
                kept.append(own)
            return x, (outcomes, kept)

        first = (list(self.first), jnp.int32(0), sides.first, cache.first)
        x, (of_first, kept_first) = through(x, first, scanned=False)
        numbers = len(model.first) + len(model.pattern) * jnp.arange(model.repeats, dtype=jnp.int32)
        blocks = (list(self.blocks.layers), numbers, sides.blocks, cache.blocks)
        body = functools.partial(through, scanned=True)
        x, (outcomes, kept) = jax.lax.scan(body, x, blocks, unroll=model.unroll)
        return x, depth.Parts(of_first, outcomes, []), Cache(kept_first, kept, cache.filled)


def no_cache(model: config.Model) -> Cache:
    """Of whole rows."""
    return Cache([{} for _ in model.first], [{} for _ in model.pattern], jnp.zeros((), jnp.int32))


def empty_cache(model: config.Model, rows: int, size: int) -> Cache:
    """Room for `size` positions of `rows` rows, in the compute type."""

    def of(kind: str) -> attention.Cache:
        return kinds.MIXERS[kinds.split(kind)[0]].cache(model, rows, size, jnp.dtype(model.compute_dtype))

    blocks = [jax.tree.map(lambda x: jnp.stack([x] * model.repeats), of(kind)) for kind in model.pattern]
    filled = jax.reshard(jnp.zeros(rows, jnp.int32), sharding.spec("batch"))
    return Cache([of(kind) for kind in model.first], blocks, filled)


def check(model: config.Model) -> None:
    """The rules of the model that its parts do not know."""
    if model.compute_dtype not in ("float32", "bfloat16"):
        raise ConfigError(f"model.compute_dtype={model.compute_dtype!r}: choose float32 or bfloat16")
    if min(model.vocab_size, model.width) < 1:
        raise ConfigError(f"model.vocab_size={model.vocab_size} and model.width={model.width}: at least 1 each")
    if model.loss_chunk < 1 or model.vocab_size % model.loss_chunk:
        raise ConfigError(
            f"model.loss_chunk={model.loss_chunk} does not divide model.vocab_size={model.vocab_size}; choose a divisor"
        )
    if model.unroll < 1 or model.repeats % model.unroll:
        raise ConfigError(
            f"model.unroll={model.unroll} does not divide model.repeats={model.repeats}; choose a divisor"
        )
    if model.further < 0 or model.further_weight < 0:
        raise ConfigError(
            f"model.further={model.further}, model.further_weight={model.further_weight}: a number of tokens (0 for none) and a "
            f"coefficient, none negative"
        )
    kinds.check(model)
    remat.check(model.remat)
