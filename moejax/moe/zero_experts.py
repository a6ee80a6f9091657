"""Zero-computation experts (Jin et al. 2024, MoE++): what a token may choose that costs nothing. Added on the spot, never sent.

Their ids start at E, in the order of the config. Places are never short.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moejax import config
from moejax.arrays import Assignment
from moejax.errors import ConfigError

KINDS = ("identity", "zero", "constant")
"""The token itself; nothing; a learned vector."""


def constants(moe: config.MoE) -> int:
    """Learned vectors that the config asks for."""
    return moe.zero_experts.count("constant")


def output(
    x: Float[Array, "G S D"], assignment: Assignment, vectors: Float[Array, "n D"] | None, moe: config.MoE
) -> Float[Array, "G S D"]:
    """Sum over a token's zero-computation assignments of gate times output, in fp32."""
    first, width = moe.num_experts, len(moe.zero_experts)
    gate = jnp.where(assignment.kept, assignment.gate, 0)

    def by_kind(token: Array, expert: Array, gate: Array) -> Array:
        empty = jnp.zeros_like(gate, shape=(x.shape[1], width))
        kind = jnp.where(expert >= first, expert - first, width)
        return empty.at[token, kind].add(gate, mode="drop")

    weight = jax.vmap(by_kind)(assignment.token, assignment.expert, gate)
    names = moe.zero_experts
    identity = sum(
        (weight[..., i] for i, name in enumerate(names) if name == "identity"), jnp.zeros_like(weight[..., 0])
    )
    y = identity[..., None] * x.astype(jnp.float32)
    if vectors is not None:
        learned = jnp.stack([weight[..., i] for i, name in enumerate(names) if name == "constant"], axis=-1)
        y = y + jnp.einsum("gsn,nd->gsd", learned, vectors.astype(jnp.float32))
    return y


def check(moe: config.MoE) -> None:
    """Known kinds."""
    for name in moe.zero_experts:
        if name not in KINDS:
            raise ConfigError(f"model.moe.zero_experts has {name!r}; each is one of {', '.join(KINDS)}")
