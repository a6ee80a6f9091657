"""Experts choose tokens (Zhou et al. 2022): perfectly balanced, a variable number of experts a token, and not causal."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from moejax import config
from moejax.arrays import NOWHERE, Assignment
from moejax.errors import ConfigError
from moejax.moe.names import ASSIGNMENT, keep
from moejax.moe.records import Inputs, Routed, nothing
from moejax.moe.routers.api import Router
from moejax.moe.routers.top_k import of_softmax


def expert_choice(inputs: Inputs, limit: Int[Array, " G"], slots: int, moe: config.MoE) -> Routed:
    """Each expert takes the `limit` valid tokens of its group with the largest probability for it, ties to the earlier."""
    p = jax.lax.stop_gradient(jax.nn.softmax(inputs.logits))
    scores = jnp.where(inputs.valid[..., None], p, -1).swapaxes(1, 2)
    token = keep(jax.lax.top_k(scores, slots)[1], ASSIGNMENT)
    rank = jnp.arange(slots, dtype=jnp.int32)[None, None]
    asked = jnp.broadcast_to(rank < limit[:, None, None], token.shape)
    expert = jnp.broadcast_to(jnp.arange(moe.num_experts, dtype=jnp.int32)[None, :, None], token.shape)
    slot = keep(jnp.where(asked, rank, NOWHERE), ASSIGNMENT)
    token, expert, asked, slot = (x.reshape(x.shape[0], -1) for x in (token, expert, asked, slot))
    return Routed(token, expert, expert, asked, slot, *nothing(inputs.valid), None)


def weigh(inputs: Inputs, routed: Routed, moe: config.MoE) -> Assignment:
    """Gate: the token's probability for the expert that took it."""
    p = jax.nn.softmax(inputs.logits)
    gate = jax.vmap(lambda p, token, expert: p[token, expert])(p, routed.token, routed.expert)
    return Assignment(routed.token, routed.expert, gate * moe.gate_scale, routed.slot)


def _check(moe: config.MoE) -> None:
    if moe.capacity_factor is None:
        raise ConfigError(
            "model.moe.capacity_factor=null with router=expert_choice: an expert takes as many tokens as it has places; set "
            "model.moe.capacity_factor=1.0"
        )


EXPERT_CHOICE = Router(
    expert_choice, weigh, causal=False, check=_check, token_choice=False, bounded=True, distribution=of_softmax
)
