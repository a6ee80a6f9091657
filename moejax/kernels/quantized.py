"""Weights kept as int8 with one fp32 scale for each output column: what a frozen expert is read from when memory traffic is the limit.

The numbers come from qwix, symmetric and calibrated by the largest value of a column; this module knows only what they mean.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


class Quantized(NamedTuple):
    """values * scale. It is frozen: its gradient is zero."""

    values: Int[Array, "G K N"]
    scale: Float[Array, "G 1 N"]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape


def whole(w: Array | Quantized, dtype: jax.typing.DTypeLike) -> Float[Array, "..."]:
    """The weights as an array, for backends that do not read int8 themselves."""
    if not isinstance(w, Quantized):
        return w
    return (w.values.astype(jnp.float32) * w.scale).astype(dtype)


def int8(w: Float[Array, "G K N"]) -> Quantized:
    """The nearest int8 weights, each column scaled by its largest value; needs qwix (pip install moejax[quant])."""
    import qwix

    # In fp32: qwix keeps the scale in the type of what it is given.
    found = qwix.quantize(w.astype(jnp.float32), jnp.int8, channelwise_axes=(0, 2))
    return Quantized(found.qvalue, found.scale)
