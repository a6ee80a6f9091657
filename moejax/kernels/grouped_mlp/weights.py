"""The weights of a group of experts, and their activation."""

from __future__ import annotations

from typing import NamedTuple

import jax
from jaxtyping import Array, Float


class Weights(NamedTuple):
    """SwiGLU experts of one width: y = (silu(x @ gate) * (x @ up)) @ down."""

    gate_up: Float[Array, "E D 2 F"]
    down: Float[Array, "E F D"]


def swiglu(h: Float[Array, "... two_F"]) -> Float[Array, "... F"]:
    """silu(gate) * up of the pre-activation [..., 2F], gate first (Shazeer 2020, eq. 6)."""
    gate, up = h[..., : h.shape[-1] // 2], h[..., h.shape[-1] // 2 :]
    return jax.nn.silu(gate) * up


def flat(gate_up: Float[Array, "E D 2 F"]) -> Float[Array, "E D two_F"]:
    return gate_up.reshape(*gate_up.shape[:2], -1)
