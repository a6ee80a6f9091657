"""Vectors of tokens from a table whose columns lie on many devices."""

from __future__ import annotations

from typing import Any

import jax
from jaxtyping import Array, Float, Int

from moejax import collectives, sharding


def embedded(table: Any, tokens: Int[Array, "B T"], dtype: Any) -> Float[Array, "B T D"]:
    """Rows of an nnx.Param [V, D:storage], cast. Every device looks its columns up for all tokens of those that hold the other columns, and
    sends each what is its own: no device ever holds the whole table or its gradient, which is summed in fp32 where it is stored."""
    held = sharding.axes("storage")

    def body(columns: Float[Array, "V d"], tokens: Int[Array, "b t"]) -> Float[Array, "b t D"]:
        every = collectives.all_gather(tokens, held, axis=0)
        return collectives.all_to_all(columns[every].astype(dtype), held, split=0, concat=2)

    where = sharding.spec("batch", "position")
    look = jax.shard_map(
        body,
        in_specs=(sharding.spec(*table.get_metadata("dims")), where),
        out_specs=sharding.spec("batch", "position", None),
    )
    return look(table[...], tokens)
