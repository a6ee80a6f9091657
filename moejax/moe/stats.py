"""RouterStats: named sums over valid tokens. Losses on them are in balancers/, numbers in train/metrics.py and diagnostics.py."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from moejax.arrays import SoftAssignment, Stats, count
from moejax.moe.balancers import Seen
from moejax.moe.places import one_hot
from moejax.moe.records import Routed


def router_sums(seen: Seen) -> Stats:
    """Counts are int32, the rest fp32.

    tokens; requested = routed + rerouted + dropped; dropped = dropped_capacity (no place) + dropped_width (beyond top_k).
    unserved: tokens that reach no expert.
    requests, load: [X], requests by the expert asked, assignments kept by the expert reached.
    probability: [X], the router's distribution. squared_logsumexp, squared_logit: of the logits, the latter over all columns.
    entropy (nats), confidence (largest probability), margin (of the choice, in the unit of the selection).
    """
    inputs, routed, p = seen.inputs, seen.routed, seen.distribution
    width = p.shape[-1]
    kept, rerouted = routed.kept, routed.rerouted

    def over_valid(x: Array) -> Array:
        mask = inputs.valid.reshape(inputs.valid.shape + (1,) * (x.ndim - 2))
        return jnp.sum(jnp.where(mask, x, 0), axis=(0, 1))

    asked, moved = count(routed.asked), count(rerouted)
    no_place = count(routed.asked & ~kept)
    beyond = over_valid(routed.excess)
    positive = p > 0
    return {
        "tokens": count(inputs.valid),
        "requested": asked + beyond,
        "routed": count(kept) - moved,
        "rerouted": moved,
        "dropped": no_place + beyond,
        "dropped_capacity": no_place,
        "dropped_width": beyond,
        "unserved": count(inputs.valid & ~served(seen)),
        "requests": count(one_hot(routed.original, width) & routed.asked[..., None], axis=(0, 1)),
        "load": count(one_hot(routed.expert, width) & kept[..., None], axis=(0, 1)),
        "probability": over_valid(p),
        "squared_logsumexp": over_valid(jnp.square(jax.nn.logsumexp(inputs.logits, axis=-1))),
        "squared_logit": over_valid(jnp.sum(jnp.square(jax.lax.stop_gradient(inputs.logits)), axis=-1)),
        "entropy": over_valid(-jnp.sum(jnp.where(positive, p * jnp.log(jnp.where(positive, p, 1)), 0), axis=-1)),
        "confidence": over_valid(jnp.max(jax.lax.stop_gradient(p), axis=-1)),
        "margin": over_valid(routed.margin),
    }


def served(seen: Seen) -> Bool[Array, "G S"]:
    """Tokens with an assignment that was kept; every valid one where slots mix them all."""
    if isinstance(seen.assignment, SoftAssignment):
        return seen.inputs.valid
    routed, size = seen.routed, seen.inputs.valid.shape[1]

    def one(token: Array, kept: Array) -> Array:
        return jnp.zeros_like(kept, shape=size).at[token].max(kept)

    return jax.vmap(one)(routed.token, routed.kept)


def label_table(routed: Routed, labels: Int[Array, "G S"], kinds: int, width: int) -> Int[Array, "kinds X"]:
    """How many kept assignments of each label went to each expert."""
    label = jnp.take_along_axis(labels, routed.token, axis=1)
    rows = jnp.where(routed.kept, label, kinds)
    return jnp.zeros((kinds, width), jnp.int32).at[rows, routed.expert].add(1, mode="drop")


def coactivation(routed: Routed, valid: Array, width: int) -> Int[Array, "X X"]:
    """Tokens that reached both experts of a pair; on the diagonal those that reached the one."""
    size = valid.shape[1]

    def one(token: Array, expert: Array, kept: Array) -> Array:
        return jnp.zeros_like(kept, shape=(size, width)).at[token, expert].max(kept)

    reached = jax.vmap(one)(routed.token, routed.expert, routed.kept).reshape(-1, width).astype(jnp.float32)
    # Sums of zeros and ones below 2**24 are exact in fp32.
    return jnp.einsum("nx,ny->xy", reached, reached, precision=jax.lax.Precision.HIGHEST).astype(jnp.int32)
