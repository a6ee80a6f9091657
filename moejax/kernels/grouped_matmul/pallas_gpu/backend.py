"""The Hopper kernels as a backend: compiled for the GPU of the mesh in use, interpreted on a CPU.

What the kernels do not take (`tiles.supports`: fp32, widths that TMA cannot address, int8) goes through `lax.ragged_dot`.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from moejax import compat
from moejax.kernels.activations import Activation
from moejax.kernels.grouped_matmul import target, xla
from moejax.kernels.grouped_matmul.backend import Backend, Groups, added, composed_glu
from moejax.kernels.grouped_matmul.pallas_gpu import forward, gated, gradient
from moejax.kernels.grouped_matmul.pallas_gpu.tiles import supports
from moejax.kernels.quantized import Quantized

INTERPRETED_AS = "h200"


def _target() -> dict[str, Any]:
    return target.here("gpu", INTERPRETED_AS, compat.gpu_interpreter)


def _where(groups: Groups) -> tuple[Array, Array]:
    return groups.sizes, jnp.asarray(groups.first, jnp.int32)


def _takes(*operands: Array | Quantized) -> bool:
    return not any(isinstance(a, Quantized) for a in operands) and supports(*operands)


def _matmul(xs: tuple, ws: tuple, groups: Groups, transpose_w: bool, bias: Array | None, out_dtype: jnp.dtype) -> Array:
    if not _takes(*xs, *ws):
        return xla.BACKEND.matmul(xs, ws, groups, transpose_w, bias, out_dtype)
    return forward.matmul(xs, ws, *_where(groups), transpose_w=transpose_w, bias=bias, out_dtype=out_dtype, **_target())


def _weight_gradient(x: Array, dy: Array, groups: Groups, out_dtype: jnp.dtype, into: Array | None = None) -> Array:
    if not _takes(x, dy):
        return xla.BACKEND.weight_gradient(x, dy, groups, out_dtype, into)
    first = out_dtype if into is None else jnp.dtype(jnp.float32)
    return added(gradient.weight_gradient(x, dy, *_where(groups), out_dtype=first, **_target()), into, out_dtype)


def _glu(x: Array, gate: Any, up: Any, gate_bias: Any, up_bias: Any, groups: Groups, activation: Activation) -> Any:
    if not _takes(x, up):
        return composed_glu(xla.BACKEND, x, gate, up, gate_bias, up_bias, groups, activation)
    biases = {"gate_bias": gate_bias, "up_bias": up_bias}
    return gated.glu(x, gate, up, *_where(groups), activation=activation, **biases, **_target())


BACKEND = Backend(_matmul, _weight_gradient, _glu, platform="gpu")
