"""Normalisation."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from moejax import sharding
from moejax.layers import init


class RMSNorm(nnx.Module):
    """x / sqrt(mean(x^2) + epsilon) * scale, in fp32, returned in x's type (Zhang and Sennrich 2019, eq. 4)."""

    def __init__(self, width: int, epsilon: float):
        self.scale = init.ones((width,))
        self.epsilon = epsilon

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        return (unit(x, self.epsilon) * sharding.whole(self.scale)[None, None, :]).astype(x.dtype)


def unit(x: Float[Array, "..."], epsilon: float, axes: tuple[int, ...] = (-1,)) -> Float[Array, "..."]:
    """x / sqrt(mean(x^2) + epsilon) over the last axes, fp32."""
    x32 = x.astype(jnp.float32)
    return x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=axes, keepdims=True) + epsilon)
