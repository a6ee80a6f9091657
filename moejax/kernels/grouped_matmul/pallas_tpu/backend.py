"""The TPU kernels as a backend: compiled for the chip of the mesh in use, interpreted anywhere else."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from moejax import compat, sharding
from moejax.errors import ConfigError
from moejax.kernels import quantized
from moejax.kernels.activations import Activation
from moejax.kernels.grouped_matmul import target
from moejax.kernels.grouped_matmul.backend import Backend, Groups
from moejax.kernels.grouped_matmul.pallas_tpu import forward, gated, gradient

INTERPRETED_AS = "v5e"


def _target(x: Array) -> dict[str, Any]:
    """For a kernel that reads x. The interpreter loses the axes that index maps vary over, so it works on one device's own arrays alone."""
    found = target.here("tpu", INTERPRETED_AS, compat.tpu_interpreter)
    if found["interpret"] and compat.varying_axes(x):
        raise ConfigError(
            f"model.moe.kernel=pallas_tpu on {sharding.platform()}: inside a layer the TPU kernels are compiled for TPU only, and "
            "interpreted only outside of shard_map; set kernel=auto"
        )
    return found


def _where(groups: Groups) -> tuple[Array, Array]:
    return groups.sizes, jnp.asarray(groups.first, jnp.int32)


def _matmul(xs: tuple, ws: tuple, groups: Groups, transpose_w: bool, bias: Array | None, out_dtype: jnp.dtype) -> Array:
    if transpose_w:  # the gradient of frozen weights' input: made with the weights they stand for
        ws = tuple(quantized.whole(w, x.dtype) for w, x in zip(ws, xs, strict=True))
    return forward.matmul(
        xs, ws, *_where(groups), transpose_w=transpose_w, bias=target.fp32(bias), out_dtype=out_dtype, **_target(xs[0])
    )


def _weight_gradient(x: Array, dy: Array, groups: Groups, out_dtype: jnp.dtype, into: Array | None = None) -> Array:
    return gradient.weight_gradient(x, dy, *_where(groups), accumulate_into=into, out_dtype=out_dtype, **_target(x))


def _glu(x: Array, gate: Any, up: Any, gate_bias: Any, up_bias: Any, groups: Groups, activation: Activation) -> Any:
    biases = {"gate_bias": target.fp32(gate_bias), "up_bias": target.fp32(up_bias)}
    return gated.glu(x, gate, up, *_where(groups), activation=activation, **biases, **_target(x))


def _dglu(
    dy: Array, down: Any, gate_h: Any, up_h: Array, row_weight: Any, groups: Groups, activation: Activation
) -> Any:
    whole = quantized.whole(down, dy.dtype)
    return gated.dglu(
        dy,
        whole,
        gate_h,
        up_h,
        *_where(groups),
        activation=activation,
        row_weight=target.fp32(row_weight),
        **_target(dy),
    )


BACKEND = Backend(_matmul, _weight_gradient, _glu, _dglu, platform="tpu")
