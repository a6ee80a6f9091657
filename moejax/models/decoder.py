"""A decoder: tokens -> final hidden vectors. Blocks of layers are scanned; a layer is a mixer and a channel part."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from moejax import config, sharding
from moejax.arrays import Batch, Stats
from moejax.errors import ConfigError
from moejax.layers import context as ctx
from moejax.layers import init, kinds
from moejax.layers.norms import RMSNorm
from moejax.layers.positions import rotary_angles
from moejax.models import remat
from moejax.moe.layer import Mode


class Layer(nnx.Module):
    """x += mixer(norm(x)); x += channel(norm(x))."""

    def __init__(self, model: config.Model, kind: str, *, rngs: nnx.Rngs):
        mixer, channel = kinds.split(kind)
        self.mixer_norm = RMSNorm(model.width, model.norm_epsilon)
        self.mixer = kinds.MIXERS[mixer](model, rngs=rngs)
        self.channel_norm = RMSNorm(model.width, model.norm_epsilon)
        self.channel = kinds.CHANNELS[channel](model, rngs=rngs)

    def __call__(self, x: Array, context: ctx.Context, layer: Array, mode: Mode) -> tuple[Array, Stats]:
        with jax.named_scope("mixer"):
            x = x + self.mixer(self.mixer_norm(x), context)
        with jax.named_scope("channel"):
            y, stats = self.channel(self.channel_norm(x), context, layer, mode)
        return x + y, stats


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

    def __call__(self, batch: Batch, key: Array, mode: Mode) -> tuple[Float[Array, "B T D"], dict[str, Stats]]:
        """Final hidden vectors, and the sums of each kind of channel stacked over its layers in order of depth."""
        model = self.model
        dtype = jnp.dtype(model.compute_dtype)
        table = sharding.gather(self.embedding, dtype)
        x = table.at[batch.tokens].get(out_sharding=sharding.spec("batch", "position", None))
        context = ctx.Context(
            ctx.attention_mask(batch.segments),
            *rotary_angles(batch.tokens.shape[1], model.head_dim, model.rope_theta),
            ctx.tokens_of(batch),
            key,
        )

        def body(x: Array, scanned: tuple[Block, Array]) -> tuple[Array, list[Stats]]:
            block, first = scanned
            sums = []
            for i, layer in enumerate(block.layers):
                x, stats = layer(x, context, first + i, mode)
                sums.append(stats)
            return x, sums

        depth = len(model.pattern) * jnp.arange(model.repeats, dtype=jnp.int32)
        x, sums = jax.lax.scan(remat.wrap(body, model.remat), x, (self.blocks, depth), unroll=model.unroll)
        return self.final_norm(x), by_kind(kinds.channels(model), sums)


def by_kind(channels: list[str], sums: list[Stats]) -> dict[str, Stats]:
    """Per layer of the pattern [repeats, ...] -> per kind of channel [layers, ...], in order of depth."""
    found: dict[str, list[Stats]] = {}
    for channel, stats in zip(channels, sums, strict=True):
        if stats:
            found.setdefault(channel, []).append(stats)
    return {kind: jax.tree.map(_interleave, *parts) for kind, parts in found.items()}


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
