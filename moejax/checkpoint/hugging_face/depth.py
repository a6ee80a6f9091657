"""Layers of a published model by number, and where moejax has them: layers of their own first, then blocks of a pattern, stacked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from moejax import config
from moejax.checkpoint.transforms import Stack, Transform
from moejax.errors import ConfigError


class Place(NamedTuple):
    """Leaves of moejax for one layer, or for the layer at one place of all blocks."""

    mixer: str
    channel: str
    target: str
    """Path of its leaves."""
    layers: str
    """Its published numbers: one, or a field `{layer:…}`."""
    stack: tuple[Transform, ...]
    """What gathers the leaves of those layers; nothing for one."""


def of_channel(model: config.Model, channel: str) -> list[int]:
    """Numbers of the layers with this channel."""
    return [number for number, kind in enumerate(config.layers(model)) if kind.endswith(f"+{channel}")]


def places(model: config.Model) -> list[Place]:
    """Every place once; together they hold every layer once."""
    head, period = len(model.first), len(model.pattern)
    depth = head + period * model.repeats
    found = [Place(*_split(kind), f"parameters/first/{i}", str(i), ()) for i, kind in enumerate(model.first)]
    for place, kind in enumerate(model.pattern):
        numbers = f"{{layer:{head + place}..{depth - 1}..{period}}}"
        found.append(Place(*_split(kind), f"parameters/blocks/layers/{place}", numbers, (Stack("layer", 0),)))
    return found


def _split(kind: str) -> tuple[str, str]:
    mixer, _, channel = kind.partition("+")
    return mixer, channel


def fold(kinds: Sequence[str]) -> dict[str, tuple[str, ...] | int]:
    """`first`, `pattern` and `repeats` of a Model with these layers: as few different layers as possible, then as few before the blocks."""
    if not kinds:
        raise ConfigError("a model without layers; give num_hidden_layers of at least 1")
    best = None
    for period in range(1, len(kinds) + 1):
        repeats = 1
        while period * (repeats + 1) <= len(kinds) and _same(kinds, period, repeats):
            repeats += 1
        head = len(kinds) - period * repeats
        if best is None or (head + period, head) < best[:2]:
            best = head + period, head, period, repeats
    assert best is not None
    _, head, period, repeats = best
    return {"first": tuple(kinds[:head]), "pattern": tuple(kinds[head : head + period]), "repeats": repeats}


def _same(kinds: Sequence[str], period: int, repeats: int) -> bool:
    """Whether the block before the last `repeats` blocks is one more of them."""
    end = len(kinds)
    before = end - period * (repeats + 1)
    return kinds[before : before + period] == kinds[end - period : end]
