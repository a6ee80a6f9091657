"""Quantiles of values spread over devices, from counts on a fixed ladder: counts add, so the mesh cannot change them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

RUNGS = 65


def ladder(reach: float) -> np.ndarray:
    """f32[RUNGS] from -reach to reach, closest together at 0, where a settled quantile lies."""
    x = np.linspace(-1, 1, RUNGS)
    return (reach * np.sinh(6 * x) / np.sinh(6)).astype(np.float32)


SIGMOID = ladder(1.0)
"""For differences of scores in [0, 1]."""

LOGITS = ladder(8.0)
"""For differences of logits; what lies outside moves the quantile by 8 a step."""


def below(values: Float[Array, "G S X"], valid: Bool[Array, "G S"], rungs: np.ndarray) -> Int[Array, "X R"]:
    """For every column, how many valid values lie below each rung."""
    values = jnp.where(valid[..., None], values, jnp.inf)

    def one(rung: Array) -> Array:
        return jnp.sum(values < rung, axis=(0, 1), dtype=jnp.int32)

    return jax.lax.map(one, jnp.asarray(rungs)).T


def at(
    counts: Int[Array, "X R"], total: Int[Array, ""], share: float | Float[Array, " X"], rungs: np.ndarray
) -> Float[Array, " X"]:
    """The value below which `share` of `total` values lie, linear between rungs, the outermost rungs where it lies beyond;
    0 of no values."""
    wanted = jnp.broadcast_to(jnp.asarray(share, jnp.float32) * total.astype(jnp.float32), counts.shape[:1])
    found = counts.astype(jnp.float32)
    steps = jnp.asarray(rungs)
    upper = jnp.clip(jnp.sum(found < wanted[:, None], axis=1, dtype=jnp.int32), 1, len(rungs) - 1)

    def pick(x: Array, index: Array) -> Array:
        return jnp.take_along_axis(x, index[:, None], axis=1)[:, 0]

    low, high = pick(found, upper - 1), pick(found, upper)
    part = jnp.clip((wanted - low) / jnp.maximum(high - low, 1), 0, 1)
    value = steps[upper - 1] + part * (steps[upper] - steps[upper - 1])
    return jnp.where(total > 0, value, 0)
