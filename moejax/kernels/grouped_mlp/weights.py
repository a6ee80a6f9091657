"""The weights of a group of experts, and their activation."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


class Weights(NamedTuple):
    """SwiGLU experts of one width: y = (silu(x @ gate) * (x @ up)) @ down."""

    gate_up: Float[Array, "E D 2 F"]
    down: Float[Array, "E F D"]


@jax.custom_vjp
def swiglu(h: Float[Array, "... two_F"]) -> Float[Array, "... F"]:
    """silu(gate) * up of the pre-activation [..., 2F], gate first (Shazeer 2020, eq. 6)."""
    gate, up = jnp.split(h, 2, axis=-1)
    return jax.nn.silu(gate) * up


def swiglu_gradient(h: Float[Array, "... two_F"], da: Float[Array, "... F"]) -> Float[Array, "... two_F"]:
    """Cotangent of the pre-activation. Written out: the derivative of a split is two padded arrays and a sum."""
    gate, up = jnp.split(h, 2, axis=-1)
    s = jax.nn.sigmoid(gate)
    return jnp.concatenate([da * up * s * (1 + gate * (1 - s)), da * gate * s], axis=-1)


swiglu.defvjp(lambda h: (swiglu(h), h), lambda h, da: (swiglu_gradient(h, da),))


def flat(gate_up: Float[Array, "E D 2 F"]) -> Float[Array, "E D two_F"]:
    return gate_up.reshape(*gate_up.shape[:2], -1)
