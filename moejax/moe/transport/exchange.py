"""Equal parts of a buffer to the devices of the expert axis: one signature, with all of each part or only what is in it."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moejax import collectives, config, sharding
from moejax.collectives import Axes
from moejax.errors import ConfigError
from moejax.moe.transport.plan import Plan


def padded(
    parts: Float[Array, "P c D"], sent: Int[Array, " P"], received: Int[Array, " P"], axes: Axes
) -> Float[Array, "P c D"]:
    """All c rows of every part by an all-to-all, whatever they hold."""
    return collectives.all_to_all(parts, axes, split=0, concat=0)


def native(
    parts: Float[Array, "P c D"], sent: Int[Array, " P"], received: Int[Array, " P"], axes: Axes
) -> Float[Array, "P c D"]:
    """The first `sent` rows of each part; of what arrives the first `received` of each are its, the rest is unspecified."""
    shards, c, width = parts.shape
    if shards == 1:
        return parts
    rows = parts.reshape(shards * c, width)
    begin = c * jnp.arange(shards, dtype=jnp.int32)
    mine = jnp.full_like(begin, c) * collectives.place(axes)
    into = collectives.vary_like(jax.lax.empty(rows.shape, rows.dtype), rows)
    begin, mine, sent, received = (collectives.vary_like(x, rows) for x in (begin, mine, sent, received))
    arrived = jax.lax.ragged_all_to_all(rows, into, begin, sent, mine, received, axis_name=collectives.several(axes))
    return arrived.reshape(parts.shape)


Exchange = Callable[[Array, Array, Array, Axes], Array]
EXCHANGES: dict[str, Exchange] = {"padded": padded, "native": native}
BY_PLATFORM = {"tpu": "native"}
"""What `auto` means; elsewhere it is `padded`: XLA has no ragged all-to-all for CPU."""


def pick(name: str) -> Exchange:
    """The exchange of this name, `auto` by the platform of the mesh in use."""
    return EXCHANGES[BY_PLATFORM.get(sharding.platform(), "padded") if name == "auto" else name]


def of(plan: Plan) -> Callable[[Array, Array, Array], Array]:
    """(parts, rows sent, rows received) -> parts received, among the devices of the plan's experts."""
    exchange = pick(plan.exchange)
    return lambda parts, sent, received: exchange(parts, sent, received, plan.axis)


def check(moe: config.MoE) -> None:
    """A name of EXCHANGES, or auto."""
    if moe.exchange not in ("auto", *EXCHANGES):
        raise ConfigError(
            f"model.moe.exchange={moe.exchange!r} is not an exchange; choose auto or one of {', '.join(EXCHANGES)}"
        )
