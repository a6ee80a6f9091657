"""The matmuls around an activation, fused with it where the backend can: gate and up forward, down backward."""

from __future__ import annotations

import functools

import jax.numpy as jnp
from jaxtyping import Array, Float

from moejax.kernels.activations import Activation
from moejax.kernels.grouped_matmul import Groups, backend
from moejax.kernels.grouped_matmul.backend import composed_glu
from moejax.kernels.quantized import Quantized

F32 = jnp.float32


def grouped_glu(
    x: Float[Array, "M D"],
    gate: Float[Array, "G D F"] | Quantized | None,
    up: Float[Array, "G D F"] | Quantized,
    groups: Groups,
    *,
    activation: Activation,
    gate_bias: Float[Array, "G F"] | None = None,
    up_bias: Float[Array, "G F"] | None = None,
    impl: str,
) -> tuple[Float[Array, "M F"], Float[Array, "M F"] | None, Float[Array, "M F"]]:
    """(a, gate_h, up_h): the activated rows and the pre-activations they came from, rounded to x's dtype before they are activated, so
    that a backward pass makes the same a again."""
    own = backend(impl)
    fused = own.glu or functools.partial(composed_glu, own)
    return fused(x, gate, up, gate_bias, up_bias, groups, activation)


def grouped_dglu(
    dy: Float[Array, "M D"],
    down: Float[Array, "G F D"] | Quantized,
    gate_h: Float[Array, "M F"] | None,
    up_h: Float[Array, "M F"],
    row_weight: Float[Array, " M"] | None,
    groups: Groups,
    *,
    activation: Activation,
    impl: str,
) -> tuple[Float[Array, "M F"] | None, Float[Array, "M F"], Float[Array, "M F"], Float[Array, " M"] | None]:
    """(d_gate_h, d_up_h, row_weight * a, d_row_weight) for the cotangent of y = row_weight * (a @ down).

    The weight's gradient is <dy, a @ down> = <dy @ down^T, a>: the output is not needed."""
    own = backend(impl)
    if own.dglu is not None:
        return own.dglu(dy, down, gate_h, up_h, row_weight, groups, activation)
    da = own.matmul((dy,), (down,), groups, True, None, jnp.dtype(F32))
    a = activation.value(gate_h, up_h)
    d_row_weight = None if row_weight is None else jnp.sum(da * a, axis=1)
    if row_weight is not None:
        da, a = da * row_weight[:, None], a * row_weight[:, None]
    d_gate_h, d_up_h = activation.gradient(gate_h, up_h, da)
    dtype = up_h.dtype
    return None if d_gate_h is None else d_gate_h.astype(dtype), d_up_h.astype(dtype), a.astype(dtype), d_row_weight
