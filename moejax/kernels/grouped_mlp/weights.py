"""The weights of a group of experts, and their activation."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


class Weights(NamedTuple):
    """SwiGLU experts of one width: y = (silu(x @ gate) * (x @ up)) @ down."""

    gate_up: Float[Array, "E D 2 F"]
    down: Float[Array, "E F D"]


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def swiglu(h: Float[Array, "... 2 F"], clamp: float | None = None) -> Float[Array, "... F"]:
    """silu(gate) * up of the pre-activation, gate first (Shazeer 2020, eq. 6).

    With `clamp` c: silu(min(gate, c)) * min(max(up, -c), c), as in gpt-oss (2025)."""
    gate, up = _clamped(h[..., 0, :], h[..., 1, :], clamp)
    return jax.nn.silu(gate) * up


def _clamped(gate: Array, up: Array, clamp: float | None) -> tuple[Array, Array]:
    return (gate, up) if clamp is None else (jnp.minimum(gate, clamp), jnp.clip(up, -clamp, clamp))


def swiglu_gradient(
    h: Float[Array, "... 2 F"], da: Float[Array, "... F"], clamp: float | None = None
) -> Float[Array, "... 2 F"]:
    """Cotangent of the pre-activation, zero where it is clamped. Written out: the derivative of two slices is two padded arrays
    and a sum."""
    free_gate, free_up = h[..., 0, :], h[..., 1, :]
    gate, up = _clamped(free_gate, free_up, clamp)
    s = jax.nn.sigmoid(gate)
    d_gate, d_up = da * up * s * (1 + gate * (1 - s)), da * gate * s
    if clamp is not None:
        d_gate, d_up = jnp.where(free_gate < clamp, d_gate, 0), jnp.where(jnp.abs(free_up) < clamp, d_up, 0)
    return jnp.stack([d_gate, d_up], axis=-2)


swiglu.defvjp(lambda h, clamp: (swiglu(h, clamp), h), lambda clamp, h, da: (swiglu_gradient(h, da, clamp),))


def pair(h: Float[Array, "... two_F"]) -> Float[Array, "... 2 F"]:
    """The columns of `flat` apart again."""
    return h.reshape(*h.shape[:-1], 2, -1)


def flat(gate_up: Float[Array, "E D 2 F"]) -> Float[Array, "E D two_F"]:
    return gate_up.reshape(*gate_up.shape[:2], -1)
