"""RouterStats: named sums over valid tokens. Formulas on the sums are in balance.py and train/metrics.py."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moejax.arrays import Assignment, Stats, count
from moejax.moe.router import Choice


def router_sums(
    logits: Float[Array, "G S E"], choice: Choice, assignment: Assignment, valid: Bool[Array, "G S"]
) -> Stats:
    """Counts are int32, the rest fp32.

    tokens, requested, routed, rerouted, dropped: scalars with requested = routed + rerouted + dropped.
    requests, load: [E], assignments asked for and kept, by expert.
    probability: [E], sum of softmax probabilities. squared_logsumexp, entropy: sums over tokens; entropy in nats.
    margin: sum over tokens of the logit of the last chosen expert less the best one left out.
    """
    experts = logits.shape[-1]
    asked = choice.wanted & valid[..., None]
    kept = assignment.kept
    log_z = jax.nn.logsumexp(logits, axis=-1)
    log_p = logits - log_z[..., None]
    p = jnp.exp(log_p)

    def over_valid(x: Array) -> Array:
        mask = valid.reshape(valid.shape + (1,) * (x.ndim - 2))
        return jnp.sum(jnp.where(mask, x, 0), axis=(0, 1))

    requested, routed = count(asked), count(kept)
    return {
        "tokens": count(valid),
        "requested": requested,
        "routed": routed,
        "rerouted": jnp.zeros_like(routed),
        "dropped": count(asked & ~kept.reshape(asked.shape)),
        "requests": count(jax.nn.one_hot(choice.expert, experts, dtype=bool) & asked[..., None], axis=(0, 1, 2)),
        "load": count(jax.nn.one_hot(assignment.expert, experts, dtype=bool) & kept[..., None], axis=(0, 1)),
        "probability": over_valid(p),
        "squared_logsumexp": over_valid(jnp.square(log_z)),
        "entropy": over_valid(-jnp.sum(p * log_p, axis=-1)),
        "margin": over_valid(_margin(logits, choice)),
    }


def _margin(logits: Float[Array, "G S E"], choice: Choice) -> Float[Array, "G S"]:
    """Smallest chosen logit less the largest one not chosen; 0 where every expert is chosen."""
    logits = jax.lax.stop_gradient(logits)
    if choice.expert.shape[-1] == logits.shape[-1]:
        return jnp.zeros_like(logits[..., 0])
    chosen = jnp.any(jax.nn.one_hot(choice.expert, logits.shape[-1], dtype=bool), axis=-2)
    lowest = jnp.min(jnp.where(chosen, logits, jnp.inf), axis=-1)
    return lowest - jnp.max(jnp.where(chosen, -jnp.inf, logits), axis=-1)


def label_table(assignment: Assignment, labels: Int[Array, "G S"], kinds: int, experts: int) -> Int[Array, "kinds E"]:
    """How many kept assignments of each label went to each expert."""
    label = jnp.take_along_axis(labels, assignment.token, axis=1)
    rows = jnp.where(assignment.kept, label, kinds)
    return jnp.zeros((kinds, experts), jnp.int32).at[rows, assignment.expert].add(1, mode="drop")
