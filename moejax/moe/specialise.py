"""Sums over the outputs of experts, for losses that look at what experts say and not at who is chosen."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jaxtyping import Bool

from moejax import config
from moejax.arrays import Stats
from moejax.errors import ConfigError
from moejax.moe.balancers import cosine_sums
from moejax.moe.routers.api import Router
from moejax.moe.transport import Transport


def sums(carrier: Transport, route: object, rows: Any, kept: Bool[Array, "G A"], size: int) -> Stats:
    """The output of every choice by itself, brought home one choice at a time over the same route; then their cosines.

    `kept` lies token by token, for groups of `size` tokens."""
    groups, number = kept.shape
    choices = number // size
    place = jnp.arange(number, dtype=jnp.int32) % choices
    outputs = [
        carrier.combine(carrier.regate(route, (kept & (place == j)[None]).astype(jnp.float32)), rows)
        for j in range(choices)
    ]
    return cosine_sums(jnp.stack(outputs, axis=2), kept.reshape(groups, size, choices))


def check(moe: config.MoE, kind: Router) -> None:
    """A pair takes two, and choices by token."""
    if moe.orthogonality and (moe.top_k < 2 or not kind.token_choice or moe.zero_experts):
        raise ConfigError(
            f"model.moe.orthogonality={moe.orthogonality} compares the outputs of a token's routed experts; with router={moe.router}, "
            f"top_k={moe.top_k}, zero_experts={moe.zero_experts} there are no such pairs; set orthogonality=0"
        )
