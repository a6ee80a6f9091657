"""The named kinds that a layer is put together from: `mixer+channel`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from moejax import config
from moejax.errors import ConfigError
from moejax.layers import attention, latent, positions
from moejax.layers.attention import Cache, GroupedQueryAttention
from moejax.layers.context import View, Where
from moejax.layers.feed_forward import Dense, Sparse
from moejax.layers.latent import LatentAttention


@dataclasses.dataclass(frozen=True)
class Mixer:
    """A kind of layer part that moves information between positions."""

    make: Callable[[config.Model, nnx.Rngs], nnx.Module]
    """The module; called with (x, view, cache) it returns its output and the cache with these positions."""
    view: Callable[[config.Model, Where, Array | None], View]
    """What its layers see, made once a step."""
    cache: Callable[[config.Model, int, int, jnp.dtype], Cache]
    """(rows, positions, type) -> an empty cache of one layer."""
    check: Callable[[config.Model], None]
    cut: tuple[str, ...]
    """Options of the model that the mesh axis `tensor` cuts, and must divide."""


def _grouped_query(section: str) -> Mixer:
    """Grouped-query attention with the options of a section of the config."""

    def options(model: config.Model) -> config.Attention:
        return getattr(model, section)

    return Mixer(
        make=lambda model, rngs: GroupedQueryAttention(model, options(model), rngs=rngs),
        view=lambda model, where, filled: attention.view(model, options(model), where, filled),
        cache=attention.cache,
        check=lambda model: attention.check(model, options(model), section),
        cut=("kv_heads",),
    )


MIXERS: dict[str, Mixer] = {
    "attention": _grouped_query("attention"),
    "local": _grouped_query("local"),
    "latent": Mixer(
        make=lambda model, rngs: LatentAttention(model, rngs=rngs),
        view=latent.view,
        cache=latent.cache,
        check=latent.check,
        cut=("heads",),
    ),
}
CHANNELS = {"dense": Dense, "sparse": Sparse}


def split(kind: str) -> tuple[str, str]:
    """`attention+sparse` -> (`attention`, `sparse`)."""
    mixer, _, channel = kind.partition("+")
    if mixer not in MIXERS or channel not in CHANNELS:
        raise ConfigError(
            f"model.pattern has {kind!r}; a layer is mixer+channel with mixer one of {', '.join(MIXERS)} "
            f"and channel one of {', '.join(CHANNELS)}"
        )
    return mixer, channel


def check(model: config.Model) -> None:
    """The pattern names known kinds, and each kind's own rules hold."""
    if not model.pattern or model.repeats < 1:
        raise ConfigError(
            f"model.pattern={model.pattern} repeated {model.repeats} times has no layer; give at least one of each"
        )
    for name in mixers(model):
        MIXERS[name].check(model)
    if model.hidden < 1:
        raise ConfigError(f"model.hidden={model.hidden}: at least 1")
    positions.check(model.rope, model.rope_theta)


def mixers(model: config.Model) -> list[str]:
    """The kinds of mixers that there are, each once."""
    return sorted({split(kind)[0] for kind in (*model.first, *model.pattern)})


def channels(layers: tuple[str, ...]) -> list[str]:
    """The channel kind of every layer, in order."""
    return [split(kind)[1] for kind in layers]


def further(model: config.Model) -> tuple[str, ...]:
    """The layers of modules that predict further tokens: each like the last of the pattern."""
    return model.pattern[-1:] * model.further


def number(model: config.Model, channel: str) -> int:
    """Layers with this channel, further modules included."""
    return channels((*config.layers(model), *further(model))).count(channel)
