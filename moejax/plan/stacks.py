"""Architectures that are counted and not built: stacks of layers, of which some kinds are built and others in moejax/plan/counted.py.

Beside kinds of layers the section `counted` takes what else such a model has: `encoder` {pattern, repeats}, whose attention sees whole
rows; `relative_bias` {buckets}, one table for the heads of each stack; `tied` {}, one embedding for input and output.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

from moejax import config
from moejax.errors import ConfigError
from moejax.layers import kinds
from moejax.layers.norms import RMSNorm
from moejax.models.decoder import Decoder
from moejax.plan import counted, parts
from moejax.plan.counted import KINDS, Layers
from moejax.plan.mixing import Mixing
from moejax.plan.parts import Part, Visits

BESIDE: dict[str, tuple[str, ...]] = {"encoder": ("pattern", "repeats"), "relative_bias": ("buckets",), "tied": ()}
"""What is counted that is no layer, and what says how large it is."""
Sections = dict[str, dict[str, Any]]
"""The section `counted`: dimensions by kind."""


def count(model: config.Model, sections: Sections, group: int | None) -> tuple[list[Part], list[Mixing]]:
    """All of a model, group tokens in a group of its routing. Raises ConfigError with what to change."""
    check(model, sections)
    layers = (*model.first, *model.pattern * model.repeats)
    every = Counter(part for kind in (*layers, *_encoder(sections)) for part in kind.split("+"))
    sparse = "sparse" in every or "sparse_plain_shared" in every
    visited = parts.visits(model.moe, group) if sparse else parts.NONE
    ends = _ends(model, "tied" in sections)
    found, mixings = _stack(model, sections, layers, visited)
    if "encoder" in sections:
        own, mixed = _stack(model, sections, _encoder(sections), visited)
        found += [p._replace(name=f"encoder {p.name}", decoding=False) for p in own]
        mixings += [m._replace(name=f"encoder {m.name}", causal=False, decoding=False) for m in mixed]
    return [*ends, *found], mixings


def _encoder(sections: Sections) -> tuple[str, ...]:
    own = sections.get("encoder", {"pattern": (), "repeats": 0})
    return tuple(own["pattern"]) * own["repeats"]


def _stack(
    model: config.Model, sections: Sections, layers: tuple[str, ...], visited: Visits
) -> tuple[list[Part], list[Mixing]]:
    """Layers on top of each other, a norm before each of their parts and one at the end."""
    every = Counter(part for kind in layers for part in kind.split("+"))
    norms = parts.leaves(lambda rngs: RMSNorm(model.width, model.norm_epsilon), every.total() + 1)
    found, mixings = [parts.of_leaves("norms", norms, parts.NONE, 1)], []
    if "relative_bias" in sections:
        found.append(counted.made("mixers", 1, [], vectors=sections["relative_bias"]["buckets"] * model.heads))
    for name, number in every.items():
        own = _layers(model, sections, name, number, visited)
        found += own.parts
        mixings += own.mixings
    return found, mixings


def _layers(model: config.Model, sections: Sections, name: str, number: int, visited: Visits) -> Layers:
    if name in KINDS:
        return KINDS[name].of(model, number, visited, **sections[name])
    if name in kinds.MIXERS:
        return counted.mixer(name, model, number)
    return counted.channel(name, model, number, visited)


def _ends(model: config.Model, tied: bool) -> list[Part]:
    """Both embeddings, as a Decoder has them."""
    plain = dataclasses.replace(model, first=(), pattern=("attention+dense",), repeats=1, further=0)
    every = parts.by_part(parts.leaves(lambda rngs: Decoder(plain, rngs=rngs)), parts.name_of)
    inputs, outputs = (parts.of_leaves(name, every[name], parts.NONE, 1) for name in ("embedding", "unembedding"))
    return [inputs, outputs._replace(parameters=0, active=0) if tied else outputs]


def check(model: config.Model, sections: Sections) -> None:
    """Every kind is known, has its dimensions, and is used."""
    known = {name: kind.dimensions for name, kind in KINDS.items()} | BESIDE
    for name, own in sections.items():
        if name not in known:
            raise ConfigError(f"config.counted.{name} is not counted; choose from {', '.join(known)}")
        if set(own) != set(known[name]):
            raise ConfigError(
                f"config.counted.{name} has {', '.join(own) or 'nothing'}; it takes {', '.join(known[name]) or 'nothing'}"
            )
        for key, number in own.items():
            if key != "pattern" and (type(number) is not int or number < 1):
                raise ConfigError(f"config.counted.{name}.{key}={number!r}: a whole number, at least 1")
    used = {part for kind in (*model.first, *model.pattern, *_encoder(sections)) for part in kind.split("+")}
    for name in sorted(used):
        if name not in {*kinds.MIXERS, *kinds.CHANNELS, *sections}:
            raise ConfigError(
                f"model.pattern has {name!r}: it is neither built ({', '.join((*kinds.MIXERS, *kinds.CHANNELS))}) nor a section of "
                f"config.counted ({', '.join(sections)}); correct it or add the section"
            )
    for name in sections:
        if name in KINDS and name not in used:
            raise ConfigError(f"config.counted.{name} is in no layer of model.first or model.pattern; remove it")
    if model.further:
        raise ConfigError(f"model.further={model.further} of an architecture that is counted; set it to 0")
