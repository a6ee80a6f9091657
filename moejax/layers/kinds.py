"""The named kinds that a layer is put together from: `mixer+channel`."""

from __future__ import annotations

from moejax import config
from moejax.errors import ConfigError
from moejax.layers import attention
from moejax.layers.attention import GroupedQueryAttention
from moejax.layers.feed_forward import Dense, Sparse

MIXERS = {"attention": GroupedQueryAttention}
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
    for kind in model.pattern:
        split(kind)
    if model.hidden < 1:
        raise ConfigError(f"model.hidden={model.hidden}: at least 1")
    attention.check(model)


def channels(model: config.Model) -> list[str]:
    """The channel kind of every layer of a block, in order."""
    return [split(kind)[1] for kind in model.pattern]
