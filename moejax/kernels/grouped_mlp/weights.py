"""The weights of a group of experts."""

from __future__ import annotations

from typing import NamedTuple

from jaxtyping import Array, Float

from moejax.kernels.quantized import Quantized


class Weights(NamedTuple):
    """Experts of one width: y = activation(x @ gate + gate_bias, x @ up + up_bias) @ down + down_bias.

    Each matrix is an array of its own, laid out as the matmuls read it. `gate` is None where the activation has one factor."""

    up: Float[Array, "E D F"] | Quantized
    down: Float[Array, "E F D"] | Quantized
    gate: Float[Array, "E D F"] | Quantized | None = None
    up_bias: Float[Array, "E F"] | None = None
    down_bias: Float[Array, "E D"] | None = None
    gate_bias: Float[Array, "E F"] | None = None
