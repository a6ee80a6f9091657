"""Between what is stacked over all layers of a kind and what a layer of the pattern takes: layers before the blocks, then the blocks."""

from __future__ import annotations

from typing import Any, NamedTuple

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


class Parts(NamedTuple):
    """Something of every layer, in order of depth."""

    first: list[Any]
    blocks: list[Any]
    """Of every layer of the pattern [repeats, ...]."""
    further: list[Any]


def parted(model: config.Model, stacked: dict[str, Any] | None, missing: Any = None) -> Parts:
    """Per kind [layers, ...] of the whole depth -> of every layer."""
    rest = dict(stacked or {})
    first = [_taken(rest, kind, 0, missing) for kind in kinds.channels(model.first)]
    further = [_taken(rest, kind, -1, missing) for kind in kinds.channels(kinds.further(model))]
    return Parts(first, of_layers(kinds.channels(model.pattern), rest, missing), further[::-1])


def _taken(rest: dict[str, Any], kind: str, end: int, missing: Any) -> Any:
    """The first or the last of the stacked layers of a kind, which `rest` then has no more."""
    if kind not in rest:
        return missing
    whole = rest[kind]
    rest[kind] = jax.tree.map(lambda x: x[:-1] if end else x[1:], whole)
    return jax.tree.map(lambda x: x[end], whole)


def joined(model: config.Model, parts: Parts) -> dict[str, Outcome]:
    """The inverse: outcomes of every layer -> per kind [layers, ...]."""
    found = by_kind(kinds.channels(model.pattern), parts.blocks)
    for kind, outcome in reversed(list(zip(kinds.channels(model.first), parts.first, strict=True))):
        _put(found, kind, outcome, before=True)
    for kind, outcome in zip(kinds.channels(kinds.further(model)), parts.further, strict=True):
        _put(found, kind, outcome, before=False)
    return found


def _put(found: dict[str, Outcome], kind: str, outcome: Outcome, before: bool) -> None:
    """The outcome of one layer at an end of those of its kind."""
    if not outcome:
        return
    one = jax.tree.map(lambda x: x[None], outcome)
    if kind not in found:
        found[kind] = one
        return
    pair = (one, found[kind]) if before else (found[kind], one)
    found[kind] = jax.tree.map(_appended, *pair)


def _appended(left: Array, right: Array) -> Array:
    """One after the other along dimension 0, which is whole on every device."""
    # Inside shard_map: of a concatenation of single entries jax 0.12 loses how the cotangent lies.
    where = jax.typeof(right).sharding.spec
    join = jax.shard_map(lambda *parts: jnp.concatenate(parts), in_specs=(where, where), out_specs=where)
    return join(jax.reshard(left, where), right)


def _interleave(*parts: Array) -> Array:
    stacked = jnp.stack(parts, axis=1)
    # A reshape alone may forget how the other dimensions lie.
    return stacked.reshape(-1, *stacked.shape[2:], out_sharding=jax.typeof(parts[0]).sharding)
