"""Equal parts of a buffer to the devices of the expert axis: one signature, with all of each part or only what is in it."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moejax import config, sharding
from moejax.errors import ConfigError
from moejax.moe.transport.plan import Plan


def padded(parts: Float[Array, "P c D"], sent: Int[Array, " P"], received: Int[Array, " P"]) -> Float[Array, "P c D"]:
    """All c rows of every part by an all-to-all, whatever they hold."""
    return sharding.all_to_all(parts, Plan.axis, split=0, concat=0)


def native(parts: Float[Array, "P c D"], sent: Int[Array, " P"], received: Int[Array, " P"]) -> Float[Array, "P c D"]:
    """The first `sent` rows of each part; of what arrives the first `received` of each are its, the rest is zero."""
    shards, c, width = parts.shape
    if shards == 1:
        return parts
    rows = parts.reshape(shards * c, width)
    begin = c * jnp.arange(shards, dtype=jnp.int32)
    mine = jnp.full_like(begin, c) * jax.lax.axis_index(Plan.axis)
    begin, mine, sent, received = (sharding.vary(x) for x in (begin, mine, sent, received))
    arrived = jax.lax.ragged_all_to_all(rows, jnp.zeros_like(rows), begin, sent, mine, received, axis_name=Plan.axis)
    return arrived.reshape(parts.shape)


Exchange = Callable[[Array, Array, Array], Array]
EXCHANGES: dict[str, Exchange] = {"padded": padded, "native": native}
BY_PLATFORM = {"tpu": "native"}
"""What `auto` means; elsewhere it is `padded`: XLA has no ragged all-to-all for CPU."""


def pick(name: str) -> Exchange:
    """The exchange of this name, `auto` by the platform of the mesh in use."""
    return EXCHANGES[BY_PLATFORM.get(sharding.platform(), "padded") if name == "auto" else name]


def check(moe: config.MoE) -> None:
    """A name of EXCHANGES, or auto."""
    if moe.exchange not in ("auto", *EXCHANGES):
        raise ConfigError(
            f"model.moe.exchange={moe.exchange!r} is not an exchange; choose auto or one of {', '.join(EXCHANGES)}"
        )
