"""Between what is stacked over all layers of a kind and what a layer of the pattern takes: layers before the blocks, then the blocks."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from moejax import config
from moejax.layers import kinds
from moejax.layers.feed_forward import Outcome


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


def parted(model: config.Model, stacked: dict[str, Any] | None, missing: Any = None) -> tuple[list[Any], list[Any]]:
    """Per kind [layers, ...] of the whole depth -> of every layer of `first`, and [repeats, ...] of every layer of the pattern."""
    first = kinds.channels(model.first)
    own, rest = [missing] * len(first), dict(stacked or {})
    for i, kind in enumerate(first):
        if kind in rest:
            own[i] = jax.tree.map(lambda x: x[0], rest[kind])
            rest[kind] = jax.tree.map(lambda x: x[1:], rest[kind])
    return own, of_layers(kinds.channels(model.pattern), rest, missing)


def joined(model: config.Model, first: list[Outcome], blocks: list[Outcome]) -> dict[str, Outcome]:
    """The inverse: outcomes of every layer of `first` [...] and of every layer of the pattern [repeats, ...] -> per kind [layers, ...]."""
    found = by_kind(kinds.channels(model.pattern), blocks)
    for kind, outcome in reversed(list(zip(kinds.channels(model.first), first, strict=True))):
        if outcome:
            one = jax.tree.map(lambda x: x[None], outcome)
            found[kind] = jax.tree.map(
                lambda *parts: jnp.concatenate(parts), one, *([found[kind]] if kind in found else [])
            )
    return found


def _interleave(*parts: Array) -> Array:
    stacked = jnp.stack(parts, axis=1)
    # A reshape alone may forget how the other dimensions lie.
    return stacked.reshape(-1, *stacked.shape[2:], out_sharding=jax.typeof(parts[0]).sharding)
