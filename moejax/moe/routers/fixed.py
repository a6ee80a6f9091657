"""Routers that do not look at the token's vector to choose: by hash, and at random."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt32

from moejax import config
from moejax.errors import ConfigError
from moejax.moe.records import Choice, Inputs, columns, nothing
from moejax.moe.routers.api import Router, scored, token_choice, weigh_by_score
from moejax.moe.routers.selection import top
from moejax.moe.routers.top_k import check_gate_moves

GOLDEN = 0x9E3779B9
"""2**32 over the golden ratio: spreads consecutive numbers."""

HASHED = {"token": lambda inputs: inputs.ids, "position": lambda inputs: inputs.position}
"""What `hash_by` may name."""


def mix32(x: UInt32[Array, "*N"]) -> UInt32[Array, "*N"]:
    """The finaliser of MurmurHash3 (Appleby 2011): every bit of x reaches every bit of the result."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def hashed(inputs: Inputs, moe: config.MoE) -> Choice:
    """The k experts whose hash with the token (or position) and the layer is largest: distinct, even, nothing to learn
    (Roller et al. 2021, Hash layers; the largest of hashes is Thaler and Ravishankar's rendezvous hashing)."""
    key = HASHED[moe.hash_by](inputs).astype(jnp.uint32)
    salt = jnp.uint32(GOLDEN) * (inputs.layer.astype(jnp.uint32) + jnp.uint32(1))
    expert = jnp.uint32(GOLDEN) * (jnp.arange(columns(moe), dtype=jnp.uint32) + jnp.uint32(1))
    bits = mix32(mix32(key + salt)[..., None] + expert[None, None]) >> 8
    return _largest(bits.astype(jnp.float32), inputs, moe)


def random(inputs: Inputs, moe: config.MoE) -> Choice:
    """k experts at random, in training and evaluation, their gates learned (Zuo et al. 2021, THOR, with combine weights)."""
    assert inputs.noise is not None
    return _largest(inputs.noise, inputs, moe)


def _largest(scores: Float[Array, "G S X"], inputs: Inputs, moe: config.MoE) -> Choice:
    expert, _ = top(scores, moe.top_k)
    return Choice(expert, jnp.ones_like(expert, dtype=bool), *nothing(inputs.valid), jax.lax.stop_gradient(scores))


def _heads(moe: config.MoE) -> dict[str, int]:
    return {} if moe.score == "constant" else {"logits": columns(moe)}


def _check(moe: config.MoE) -> None:
    check_gate_moves(moe)
    if moe.score == "constant" and not moe.renormalize:
        raise ConfigError(
            "model.moe.renormalize=False with score=constant: gates are 1 / top_k each; set renormalize=True"
        )
    if moe.hash_by not in HASHED:
        raise ConfigError(f"model.moe.hash_by={moe.hash_by!r}: choose one of {', '.join(HASHED)}")
    if not _heads(moe) and (moe.load_balance or moe.router_z):
        raise ConfigError(
            f"model.moe.load_balance={moe.load_balance}, router_z={moe.router_z} with router={moe.router}, score=constant: there "
            f"is no router to train; set both to 0"
        )


READS = frozenset({"score", "renormalize", "order", "reroute"})
HASH = Router(
    token_choice(hashed, scored), weigh_by_score, causal=True, reads=READS | {"hash_by"}, check=_check, heads=_heads
)
RANDOM = Router(
    token_choice(random, scored),
    weigh_by_score,
    causal=True,
    reads=READS,
    check=_check,
    heads=_heads,
    noise=columns,
    always_random=True,
)
