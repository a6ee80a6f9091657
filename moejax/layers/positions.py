"""Rotary positions (Su et al. 2021, eq. 34), halves paired as in Llama."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moejax import sharding


def rotary_angles(positions: int, head_dim: int, theta: float) -> tuple[Float[Array, "T half"], Float[Array, "T half"]]:
    """Cosine and sine of position * theta^(-2i/head_dim), fp32. Only differences matter, so rows count from 0."""
    frequency = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angle = jnp.arange(positions, dtype=jnp.float32)[:, None] * frequency[None, :]
    return jnp.cos(angle), jnp.sin(angle)


def rotate(
    x: Float[Array, "B T H d"], cosine: Float[Array, "T half"], sine: Float[Array, "T half"]
) -> Float[Array, "B T H d"]:
    """Each pair (x[i], x[i + d/2]) turned by its angle, in fp32."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cosine, sine = (jax.reshard(a, sharding.spec("position", None))[None, :, None, :] for a in (cosine, sine))
    turned = jnp.concatenate([first * cosine - second * sine, second * cosine + first * sine], axis=-1)
    return turned.astype(x.dtype)
