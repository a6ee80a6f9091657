"""Losses that shape scores and outputs rather than the load: z-loss, sparsity, and two for specialisation."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from moejax import config
from moejax.arrays import Stats
from moejax.moe.balancers.api import Balancer, Seen, share
from moejax.moe.records import State, mean_k

SPARSITY_STEP = 1.2
"""Factor of the L1 coefficient a step (Wang et al. 2024, ReMoE, section 3.4)."""
SPARSITY_LIMIT = 1e12
"""The factor that the coefficient may grow or shrink by in all, so that it neither vanishes for good nor overflows."""


def router_z(stats: Stats, moe: config.MoE) -> Float[Array, ""]:
    """Mean squared logsumexp of the router's logits (Zoph et al. 2022, eq. 5)."""
    return share(stats["squared_logsumexp"], stats["tokens"])


def score_variance(stats: Stats, moe: config.MoE) -> Float[Array, ""]:
    """Minus the variance of each expert's probability over tokens, averaged over experts: small where an expert is sure of
    its tokens (Guo et al. 2025, "Advancing expert specialization", variance loss)."""
    mean = share(stats["probability"], stats["tokens"])
    return -jnp.mean(share(stats["squared_probability"], stats["tokens"]) - jnp.square(mean))


def _squares(seen: Seen, moe: config.MoE) -> Stats:
    p = jnp.where(seen.inputs.valid[..., None], seen.distribution, 0)
    return {"squared_probability": jnp.sum(jnp.square(p), axis=(0, 1))}


def orthogonality(stats: Stats, moe: config.MoE) -> Float[Array, ""]:
    """Mean squared cosine between the outputs of two experts of a token, over all such pairs (Guo et al. 2025,
    orthogonality loss, with unit vectors): 0 where experts say different things, 1 where they repeat each other."""
    return share(stats["squared_cosine"], stats["pairs"])


def cosine_sums(outputs: Float[Array, "G S K D"], kept: Bool[Array, "G S K"]) -> Stats:
    """Squared cosines of the outputs of every pair of kept choices of a token, and their number."""
    outputs = outputs.astype(jnp.float32)
    length = jnp.sum(jnp.square(outputs), axis=-1)
    inner = jnp.einsum("gskd,gsjd->gskj", outputs, outputs)
    scale = length[..., :, None] * length[..., None, :]
    pair = (
        kept[..., :, None] & kept[..., None, :] & jnp.triu(jnp.ones((1, 1, *inner.shape[-2:]), bool), 1) & (scale > 0)
    )
    squares = jnp.where(pair, jnp.square(inner) / jnp.where(pair, scale, 1), 0)
    return {"squared_cosine": jnp.sum(squares), "pairs": jnp.sum(pair, dtype=jnp.int32)}


def sparsity(stats: Stats, moe: config.MoE) -> Float[Array, ""]:
    """L1 of the gates, each expert's weighted by its load over the fair one (Wang et al. 2024, ReMoE, eq. 12)."""
    load = share(stats["positive"], stats["tokens"]) * (stats["positive"].shape[-1] / mean_k(moe))
    return jnp.sum(load * share(stats["gate_mass"], stats["tokens"]))


def _gate_mass(seen: Seen, moe: config.MoE) -> Stats:
    """Positive logits summed and counted by expert, those beyond top_k included."""
    logits = jnp.where(seen.inputs.valid[..., None], seen.inputs.logits, 0)
    return {
        "gate_mass": jnp.sum(jax.nn.relu(logits), axis=(0, 1)),
        "positive": jnp.sum(logits > 0, axis=(0, 1), dtype=jnp.int32),
    }


def _steer(state: State, stats: Stats, moe: config.MoE) -> State:
    """The coefficient of a layer grows while its tokens take more experts than mean_k, and shrinks while they take fewer
    (ReMoE, eq. 10; there one coefficient for all layers)."""
    direction = jnp.sign(share(jnp.sum(stats["positive"], dtype=jnp.int32), stats["tokens"]) - mean_k(moe))
    moved = state["sparsity_weight"] * jnp.float32(SPARSITY_STEP) ** direction
    moved = jnp.clip(moved, 1 / SPARSITY_LIMIT, SPARSITY_LIMIT)
    return {"sparsity_weight": jnp.where(stats["tokens"] > 0, moved, state["sparsity_weight"])}


ROUTER_Z = Balancer(router_z)
SCORE_VARIANCE = Balancer(score_variance, sums=_squares)
ORTHOGONALITY = Balancer(orthogonality)
SPARSITY = Balancer(
    sparsity,
    weight="sparsity_weight",
    sums=_gate_mass,
    init=lambda moe: {"sparsity_weight": jnp.float32(1)},
    update=_steer,
)
