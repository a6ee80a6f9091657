"""Initial values of parameters. A parameter says as it is made how its dimensions are named (sharding.RULES), whether it decays, and what
it is to the rules of transfer (layers/transfer.py): its role, and the inputs that each of its outputs sums."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from flax import nnx

from moejax import sharding


def normal(
    rngs: nnx.Rngs,
    shape: tuple[int, ...],
    dims: tuple[str | None, ...],
    fan_in: int,
    gain: float = 1.0,
    decay: bool = True,
    role: str = "hidden",
) -> nnx.Param:
    """fp32 normal with standard deviation gain / sqrt(fan_in), made in the shards it is stored in."""
    where = sharding.spec(*dims)
    value = jax.random.normal(rngs.params(), shape, jnp.float32, out_sharding=where) * (gain / math.sqrt(fan_in))
    return nnx.Param(value, dims=dims, decay=decay, role=role, fan_in=fan_in)


def ones(shape: tuple[int, ...], dims: tuple[str | None, ...] | None = None) -> nnx.Param:
    """fp32 ones, replicated unless `dims` says otherwise: for scales."""
    dims = dims or (None,) * len(shape)
    return _vector(jnp.ones(shape, jnp.float32, out_sharding=sharding.spec(*dims)), dims)


def zeros(shape: tuple[int, ...], dims: tuple[str | None, ...]) -> nnx.Param:
    """fp32 zeros, made in the shards they are stored in: for biases."""
    return _vector(jnp.zeros(shape, jnp.float32, out_sharding=sharding.spec(*dims)), dims)


def _vector(value: jax.Array, dims: tuple[str | None, ...]) -> nnx.Param:
    return nnx.Param(value, dims=dims, decay=False, role="vector", fan_in=1)
