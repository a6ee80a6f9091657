"""A decoder: tokens -> final hidden vectors. Blocks of layers are scanned; a layer is a mixer and a channel part."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from moejax import config, sharding
from moejax.arrays import Batch
from moejax.errors import ConfigError
from moejax.layers import context as ctx
from moejax.layers import init, kinds
from moejax.layers.feed_forward import Outcome, Side
from moejax.layers.norms import RMSNorm
from moejax.layers.positions import rotary_angles
from moejax.models import remat
from moejax.moe.inputs import Mode
from moejax.moe.records import State
from moejax.moe.replay import Recorded

Routing = dict[str, State]
"""State of the layers of each kind of channel, stacked in order of depth."""
Recordings = dict[str, Recorded]


class Layer(nnx.Module):
    """x += mixer(norm(x)); x += channel(norm(x))."""

    def __init__(self, model: config.Model, kind: str, *, rngs: nnx.Rngs):
        mixer, channel = kinds.split(kind)
        self.mixer_norm = RMSNorm(model.width, model.norm_epsilon)
        self.mixer = kinds.MIXERS[mixer](model, rngs=rngs)
        self.channel_norm = RMSNorm(model.width, model.norm_epsilon)
        self.channel = kinds.CHANNELS[channel](model, rngs=rngs)

    def __call__(self, x: Array, context: ctx.Context, layer: Array, mode: Mode, side: Side) -> tuple[Array, Outcome]:
        with jax.named_scope("mixer"):
            x = x + self.mixer(self.mixer_norm(x), context)
        with jax.named_scope("channel"):
            y, outcome = self.channel(self.channel_norm(x), context, layer, mode, side)
        return x + y, outcome


class Block(nnx.Module):
    """The layers of one turn of the scan."""

    def __init__(self, model: config.Model, *, rngs: nnx.Rngs):
        self.layers = nnx.List([Layer(model, kind, rngs=rngs) for kind in model.pattern])


class Decoder(nnx.Module):
    """Embedding, blocks stacked for the scan, final norm, and the output projection that the loss reads in chunks."""

    def __init__(self, model: config.Model, *, rngs: nnx.Rngs):
        self.model = model
        v, d = model.vocab_size, model.width
        self.embedding = init.normal(rngs, (v, d), (None, "storage"), fan_in=1, decay=False)
        keys = jax.random.split(rngs.params(), model.repeats)
        self.blocks = jax.lax.map(lambda key: Block(model, rngs=nnx.Rngs(key)), keys)
        self.final_norm = RMSNorm(d, model.norm_epsilon)
        self.unembedding = init.normal(rngs, (d, v), ("storage", None), fan_in=d)

    def __call__(
        self, batch: Batch, key: Array, mode: Mode, routing: Routing, step: Array, recorded: Recordings | None = None
    ) -> tuple[Float[Array, "B T D"], dict[str, Outcome]]:
        """Final hidden vectors, and what each kind of channel reports, stacked over its layers in order of depth.

        `routing` is the state of every kind of channel, `recorded` routing to play back, both stacked alike; `step` the
        updates made.
        """
        model = self.model
        dtype = jnp.dtype(model.compute_dtype)
        table = sharding.gather(self.embedding, dtype)
        x = table.at[batch.tokens].get(out_sharding=sharding.spec("batch", "position", None))
        context = ctx.Context(
            ctx.attention_mask(batch.segments),
            *rotary_angles(batch.tokens.shape[1], model.head_dim, model.rope_theta),
            ctx.tokens_of(batch),
            key,
            step,
        )

        channels = kinds.channels(model)
        sides = [
            Side(*pair) for pair in zip(of_layers(channels, routing, {}), of_layers(channels, recorded), strict=True)
        ]

        def body(x: Array, scanned: tuple[Block, Array, list[Side]]) -> tuple[Array, list[Outcome]]:
            block, first, sides = scanned
            outcomes = []
            for i, (layer, side) in enumerate(zip(block.layers, sides, strict=True)):
                x, outcome = layer(x, context, first + i, mode, side)
                outcomes.append(outcome)
            return x, outcomes

        depth = len(model.pattern) * jnp.arange(model.repeats, dtype=jnp.int32)
        scanned = (self.blocks, depth, sides)
        x, outcomes = jax.lax.scan(remat.wrap(body, model.remat), x, scanned, unroll=model.unroll)
        return self.final_norm(x), by_kind(channels, outcomes)


def by_kind(channels: list[str], outcomes: list[Outcome]) -> dict[str, Outcome]:
    """Per layer of the pattern [repeats, ...] -> per kind of channel [layers, ...], in order of depth."""
    found: dict[str, list[Outcome]] = {}
    for channel, outcome in zip(channels, outcomes, strict=True):
        if outcome:
            found.setdefault(channel, []).append(outcome)
    return {kind: jax.tree.map(_interleave, *parts) for kind, parts in found.items()}


def of_layers(channels: list[str], stacked: dict[str, Any] | None, missing: Any = None) -> list[Any]:
    """The inverse of `by_kind`: per kind [layers, ...] -> per layer of the pattern [repeats, ...]."""
    places = {kind: [i for i, c in enumerate(channels) if c == kind] for kind in channels}

    def one(i: int, kind: str) -> Any:
        if not stacked or kind not in stacked:
            return missing
        of_kind = places[kind]
        return jax.tree.map(lambda x: x.reshape(-1, len(of_kind), *x.shape[1:])[:, of_kind.index(i)], stacked[kind])

    return [one(i, kind) for i, kind in enumerate(channels)]


def _interleave(*parts: Array) -> Array:
    stacked = jnp.stack(parts, axis=1)
    return stacked.reshape(-1, *stacked.shape[2:])


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
    kinds.check(model)
    remat.check(model.remat)
