"""Noise that is the same on every mesh, microbatching and batch shape: one key per (seed, step, layer, row, use)."""

from __future__ import annotations

import zlib

import jax
from jaxtyping import Array, Float, Int


def step_key(seed: int, step: Int[Array, ""]) -> Array:
    """The key of one step."""
    return jax.random.fold_in(jax.random.key(seed), step)


def uniform(key: Array, layer: Array, row_ids: Int[Array, " B"], use: str, *shape: int) -> Float[Array, "B ..."]:
    """One array of uniform numbers per row: its key is folded from the step's key, the layer, the row's id and the use.

    The leading entry of `shape` is positions: a longer row starts with the same numbers as a shorter one.
    """
    key = jax.random.fold_in(jax.random.fold_in(key, layer), zlib.crc32(use.encode()))
    return jax.vmap(lambda row: jax.random.uniform(jax.random.fold_in(key, row), shape))(row_ids)
