"""What mixers cost beside their weights: scores by the positions seen, and what is kept of the positions before."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from moejax import config
from moejax.layers import kinds
from moejax.plan.parts import ONE_DEVICE


class Mixing(NamedTuple):
    """Layers of one kind."""

    name: str
    layers: int
    pair: int = 0
    """FLOPs of one layer for a query and a key that it sees: scores and their sum of values, over all heads."""
    window: int = 0
    """Positions that a query sees; 0 for all before it."""
    chunk: int = 0
    """Positions of the pieces within which queries see; 0 for no pieces."""
    causal: bool = True
    """A query sees positions up to its own; else all of a row as long."""
    kept: int = 0
    """Numbers that a cache keeps of a position in one layer, in the compute type."""
    limit: int = 0
    """Positions of which they are needed; 0 for all."""
    fixed: int = 0
    """Bytes of state that one layer keeps of a sequence, however long."""
    step: int = 0
    """FLOPs of one layer for a token, however many came before: recurrences and convolutions."""
    remade: int = 0
    """FLOPs of one layer for a position of the cache, from which each decoding step makes keys and values anew."""
    decoding: bool = True
    """Takes part in decoding."""


def pairs(mixing: Mixing, context: int) -> int:
    """Queries and keys that see each other in a row of so many positions."""
    if not mixing.causal:
        return context * context
    piece = min(mixing.chunk or context, context)
    window = min(mixing.window or piece, piece)

    def of_piece(size: int) -> int:
        """The first queries see all up to their own, later ones the window."""
        first = min(size, window)
        return first * (first + 1) // 2 + (size - first) * window

    return context // piece * of_piece(piece) + of_piece(context % piece)


def seen(mixing: Mixing, position: int) -> int:
    """Positions that the query at this position sees, counted from 1, its own included."""
    inside = (position - 1) % mixing.chunk + 1 if mixing.chunk else position
    return min(mixing.window or inside, inside)


def _grouped_query(section: str) -> Callable[[config.Model, int], Mixing]:
    """Of attention with the options of a section of the config."""

    def of(model: config.Model, layers: int) -> Mixing:
        own: config.Attention = getattr(model, section)
        limits = [n for n in (own.window, own.chunk) if n]
        pair = 4 * model.heads * model.head_dim
        return Mixing(section, layers, pair, own.window, own.chunk, limit=min(limits, default=0))

    return of


def _latent(model: config.Model, layers: int) -> Mixing:
    """Of latent attention: keys have nope + rope dimensions, values their own number."""
    own = model.latent
    pair = 2 * model.heads * (own.nope + own.rope + own.value)
    return Mixing("latent", layers, pair, remade=2 * own.rank * model.heads * (own.nope + own.value))


SCORED: dict[str, Callable[[config.Model, int], Mixing]] = {
    "attention": _grouped_query("attention"),
    "local": _grouped_query("local"),
    "latent": _latent,
}
"""By the name of the mixer, as in moejax.layers.kinds.MIXERS."""


def of_layers(model: config.Model, name: str, layers: int, decoding: bool = True) -> Mixing:
    """Of built mixers. What a cache keeps is read off the cache that the mixer makes."""
    with jax.sharding.use_abstract_mesh(ONE_DEVICE):
        made = jax.eval_shape(lambda: kinds.MIXERS[name].cache(model, 1, 1, jnp.dtype(model.compute_dtype)))
    kept = sum(math.prod(x.shape) for x in jax.tree.leaves(made))
    return SCORED[name](model, layers)._replace(kept=kept, decoding=decoding)
