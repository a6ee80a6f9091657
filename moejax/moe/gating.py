"""What gates multiply: the output of an expert, or its input.

At the input every choice of a token is a row of its own, gate times the token, with a gate of 1 on the way back. So any transport does it,
with K rows a token where it had one.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from moejax import config
from moejax.arrays import Assignment, SoftAssignment
from moejax.errors import ConfigError
from moejax.moe.routers.api import Router

GATE_AT = ("output", "input")


def choices(moe: config.MoE) -> int:
    """Rows that are carried for a token."""
    return moe.top_k if moe.gate_at == "input" else 1


def scaled(
    x: Float[Array, "G S D"], mine: Assignment | SoftAssignment, moe: config.MoE
) -> tuple[Float[Array, "G A D"], Assignment | SoftAssignment]:
    """Each assignment's token times its gate, and the assignment of these rows; assignments lie token by token (Llama 4 2025)."""
    if moe.gate_at == "output":
        return x, mine
    assert isinstance(mine, Assignment)
    rows = jnp.repeat(x, moe.top_k, axis=1).astype(jnp.float32) * mine.gate[..., None]
    token = jnp.broadcast_to(jnp.arange(mine.token.shape[1], dtype=jnp.int32)[None], mine.token.shape)
    return rows.astype(x.dtype), Assignment(token, mine.expert, jnp.ones_like(mine.gate), mine.slot)


def summed(y: Float[Array, "G A D"], moe: config.MoE) -> Float[Array, "G S D"]:
    """The choices of each token added."""
    g, a, d = y.shape
    return jnp.sum(y.reshape(g, a // choices(moe), choices(moe), d), axis=2) if choices(moe) > 1 else y


def check(moe: config.MoE, kind: Router) -> None:
    """A known place, and what stands on the output only where gates are there."""
    if moe.gate_at not in GATE_AT:
        raise ConfigError(f"model.moe.gate_at={moe.gate_at!r}: choose one of {', '.join(GATE_AT)}")
    if moe.gate_at == "input" and (not kind.token_choice or moe.orthogonality or moe.zero_experts):
        raise ConfigError(
            f"model.moe.gate_at=input with router={moe.router}, orthogonality={moe.orthogonality}, zero_experts={moe.zero_experts}: it "
            f"wants a router by which tokens choose, and neither of the others; set gate_at=output"
        )
