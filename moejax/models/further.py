"""Further tokens predicted by modules of one layer each (multi-token prediction, DeepSeek-V3 2024, section 2.2)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from moejax import config, sharding
from moejax.arrays import Batch
from moejax.layers import init
from moejax.layers.norms import RMSNorm

if TYPE_CHECKING:
    from moejax.models.decoder import Layer


class Module(nnx.Module):
    """Module k: from the hidden vector of depth k - 1 and the token k places on, one layer, to predict the token after that."""

    def __init__(self, model: config.Model, layer: Layer, *, rngs: nnx.Rngs):
        d = model.width
        self.token_norm, self.hidden_norm = (RMSNorm(d, model.norm_epsilon) for _ in range(2))
        self.join = init.normal(rngs, (2, d, d), (None, "storage", None), fan_in=2 * d)
        self.layer = layer
        self.final_norm = RMSNorm(d, model.norm_epsilon)

    def joined(self, hidden: Float[Array, "B T D"], token: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Both, normed, through one matrix (eq. 21); the token's half comes first."""
        both = jnp.stack([self.token_norm(token), self.hidden_norm(hidden)], axis=2)
        where = sharding.spec("batch", "position", None)
        return jnp.einsum("btcd,cdf->btf", both, sharding.gather(self.join, hidden.dtype), out_sharding=where)


def moved(x: Int[Array, "B T"] | Bool[Array, "B T"], places: int) -> Array:
    """What stands so many places on in the row; 0 past its end."""
    whole = jax.reshard(x, sharding.spec("batch", None))
    taken = jnp.pad(whole[:, places:], ((0, 0), (0, places)))
    return jax.reshard(taken, sharding.spec("batch", "position"))


def of_depth(batch: Batch, depth: int) -> Batch:
    """What module `depth`, from 1, reads and predicts: the tokens `depth` places on and those after. A position is valid where they and
    all between lie in its document."""
    valid = batch.valid
    for place in range(1, depth + 1):
        valid &= moved(batch.valid, place) & (batch.segments == moved(batch.segments, place))
    return Batch(
        tokens=moved(batch.targets, depth - 1),
        targets=moved(batch.targets, depth),
        segments=batch.segments,
        valid=valid,
        labels=batch.labels,
        row_ids=batch.row_ids,
    )
