"""Layers that are counted and not built, each one function; it goes when the layer is built.

A config of such an architecture has a section `counted` beside the usual ones, that names kinds of this file and their dimensions.
`model.pattern` may then name them. A layer is parts joined by +, each behind a norm of its own: one, two, or with `cross` three.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp

from moejax import config
from moejax.layers import kinds
from moejax.plan import mixing, parts
from moejax.plan.mixing import Mixing
from moejax.plan.parts import Part, Visits

FP32 = 4
"""Bytes of a number of recurrent state."""


class Layers(NamedTuple):
    """Equal layers, counted."""

    parts: list[Part]
    mixings: list[Mixing]


class Kind(NamedTuple):
    """What a part of a layer may be that is not built."""

    of: Callable[..., Layers]
    """(model, number of layers, visits of experts, dimensions by name) -> all of these layers."""
    dimensions: tuple[str, ...]
    """That the section gives, whole numbers."""


def made(name: str, layers: int, matrices: list[tuple[int, int]], vectors: int = 0) -> Part:
    """Matrices (in, out) that every token goes through and other parameters, of each of so many layers."""
    weights = layers * sum(into * out for into, out in matrices)
    every = weights + layers * vectors
    return Part(name, every, every, weights, weights, layers * sum(out for _, out in matrices))


def mixer(name: str, model: config.Model, layers: int) -> Layers:
    """Built mixers, counted by their own modules."""
    own = parts.leaves(lambda rngs: kinds.MIXERS[name].make(model, rngs), layers)
    return Layers([parts.of_leaves("mixers", own, parts.NONE, 1)], [mixing.of_layers(model, name, layers)])


def channel(name: str, model: config.Model, layers: int, visited: Visits) -> Layers:
    """Built channels, counted by their own modules."""
    own = parts.by_part(parts.leaves(lambda rngs: kinds.CHANNELS[name](model, rngs=rngs), layers), parts.in_channel)
    return Layers([parts.of_leaves(part, some, visited, model.moe.num_experts) for part, some in own.items()], [])


def _recurrent(name: str, model: config.Model, layers: int, conv: int, width: int, state: int, products: int) -> Mixing:
    """A convolution of `conv` taps over `width` channels, and a state of so many numbers that each token meets in `products` products."""
    element = jnp.dtype(model.compute_dtype).itemsize
    fixed = FP32 * state + element * (conv - 1) * width
    return Mixing(name, layers, fixed=fixed, step=2 * conv * width + 2 * products * state)


def gated_delta(
    model: config.Model, layers: int, visited: Visits, key_heads: int, value_heads: int, head: int, conv: int
) -> Layers:
    """Gated DeltaNet (Yang et al. 2024) as Qwen3.5 has it: one convolution over queries, keys and values; two gates a value head.

    The state of a head is met three times: read by the key, written, read by the query. Chunked training does more."""
    d, values = model.width, value_heads * head
    through = 2 * key_heads * head + values
    matrices = [(d, through), (d, values), (d, value_heads), (d, value_heads), (values, d)]
    part = made("mixers", layers, matrices, vectors=conv * through + 2 * value_heads + head)
    return Layers([part], [_recurrent("gated_delta", model, layers, conv, through, value_heads * head * head, 3)])


def mamba2(
    model: config.Model, layers: int, visited: Visits, heads: int, head: int, groups: int, state: int, conv: int
) -> Layers:
    """Mamba-2 (Dao and Gu 2024) as Nemotron-H has it: a convolution with a bias, a gated norm, a skip, a step and a decay a head.

    The state is met twice: written, and read."""
    d, inner = model.width, heads * head
    through = inner + 2 * groups * state
    part = made(
        "mixers", layers, [(d, inner + through + heads), (inner, d)], vectors=(conv + 1) * through + 3 * heads + inner
    )
    return Layers([part], [_recurrent("mamba2", model, layers, conv, through, heads * head * state, 2)])


def gated_attention(model: config.Model, layers: int, visited: Visits) -> Layers:
    """The full attention of Qwen3.5: grouped-query attention whose output is multiplied by sigmoid(x @ gate)."""
    own = mixer("attention", model, layers)
    gate = made("mixers", layers, [(model.width, model.heads * model.head_dim)])
    return own._replace(parts=[*own.parts, gate])


def indexed(model: config.Model, layers: int, visited: Visits, heads: int, width: int, top: int) -> Layers:
    """Latent attention with the sparse indexer of GLM-5 (DeepSeek-V3.2 2025): a score of every position before by narrow heads, one key
    for all of them, whose cache it keeps beside; attention sees the `top` best. Queries come from the query's narrow vector."""
    own, rank = reusing(model, layers, visited, top), model.latent.query_rank
    matrices = [(rank, heads * width), (model.width, width), (model.width, heads)]
    part = made("mixers", layers, matrices, vectors=2 * width)
    return Layers([*own.parts, part], [*own.mixings, Mixing("indexer", layers, 2 * heads * (width + 1), kept=width)])


def reusing(model: config.Model, layers: int, visited: Visits, top: int) -> Layers:
    """Latent attention to the positions that the last layer with an indexer chose."""
    own = mixer("latent", model, layers)
    return own._replace(mixings=[m._replace(window=top, remade=0) for m in own.mixings])


def sparse_plain_shared(model: config.Model, layers: int, visited: Visits, hidden: int) -> Layers:
    """A sparse channel as it is built, latent experts too, beside a shared expert with one factor: down(activation(up x))."""
    own = channel("sparse", model, layers, visited)
    return own._replace(parts=[*own.parts, _plain("shared", model, layers, hidden)])


def plain(model: config.Model, layers: int, visited: Visits, hidden: int) -> Layers:
    """A dense channel with one factor: down(activation(up x))."""
    return Layers([_plain("dense", model, layers, hidden)], [])


def _plain(name: str, model: config.Model, layers: int, hidden: int) -> Part:
    return made(name, layers, [(model.width, hidden), (hidden, model.width)])


def cross(model: config.Model, layers: int, visited: Visits) -> Layers:
    """Attention of a decoder to a source as long as its own row. Decoding finds the source's keys and values in its cache."""
    own = parts.leaves(lambda rngs: kinds.MIXERS["attention"].make(model, rngs), layers)
    source = [leaf for leaf in own if leaf.path[0] in ("key", "value")]
    target = [leaf for leaf in own if leaf not in source]
    (scored,) = mixer("attention", model, layers).mixings
    found = [
        parts.of_leaves("mixers", target, parts.NONE, 1),
        parts.of_leaves("encoder mixers", source, parts.NONE, 1, decoding=False),
    ]
    return Layers(found, [scored._replace(name="cross", causal=False)])


KINDS: dict[str, Kind] = {
    "gated_delta": Kind(gated_delta, ("key_heads", "value_heads", "head", "conv")),
    "gated_attention": Kind(gated_attention, ()),
    "mamba2": Kind(mamba2, ("heads", "head", "groups", "state", "conv")),
    "indexed": Kind(indexed, ("heads", "width", "top")),
    "reusing": Kind(reusing, ("top",)),
    "sparse_plain_shared": Kind(sparse_plain_shared, ("hidden",)),
    "plain": Kind(plain, ("hidden",)),
    "cross": Kind(cross, ()),
}
"""By the name that the section `counted` and a pattern give it."""
