"""The TPU kernels as a backend: compiled for the chip of the mesh in use, interpreted anywhere else."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

import jax
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


def _run(kernel: Callable[..., Any], *arrays: Any, **named: Any) -> Any:
    """The kernel on arrays, with what it must know of the machine."""
    settings = target.here("tpu", INTERPRETED_AS, compat.tpu_interpreter)
    bound = functools.partial(kernel, **settings)
    if not settings["interpret"]:
        return bound(*arrays, **named)
    _check_threads(jax.sharding.get_abstract_mesh().size)
    return compat.without_varying(bound, *arrays, **named)


def _check_threads(devices: int) -> None:
    """Interpreted kernels of all devices wait for each other in threads of one pool, and need one more of it to be handed arrays."""
    asked = int(os.environ.get("NPROC") or os.cpu_count() or 1)
    threads = max(asked, jax.local_device_count())
    if threads <= devices:
        raise ConfigError(
            f"model.moe.kernel=pallas_tpu on {sharding.platform()}, interpreted on {devices} devices with {threads} threads: at least one "
            f"more than devices, or they wait for ever; set NPROC={2 * devices} in the environment before the start, or kernel=auto"
        )


def _where(groups: Groups) -> tuple[Array, Array]:
    return groups.sizes, jnp.asarray(groups.first, jnp.int32)


def _matmul(xs: tuple, ws: tuple, groups: Groups, transpose_w: bool, bias: Array | None, out_dtype: jnp.dtype) -> Array:
    if transpose_w:  # the gradient of frozen weights' input: made with the weights they stand for
        ws = tuple(quantized.whole(w, x.dtype) for w, x in zip(ws, xs, strict=True))
    kernel = functools.partial(forward.matmul, transpose_w=transpose_w, out_dtype=out_dtype)
    return _run(kernel, xs, ws, *_where(groups), bias=target.fp32(bias))


def _weight_gradient(x: Array, dy: Array, groups: Groups, out_dtype: jnp.dtype, into: Array | None = None) -> Array:
    kernel = functools.partial(gradient.weight_gradient, out_dtype=out_dtype)
    return _run(kernel, x, dy, *_where(groups), accumulate_into=into)


def _glu(x: Array, gate: Any, up: Any, gate_bias: Any, up_bias: Any, groups: Groups, activation: Activation) -> Any:
    biases = {"gate_bias": target.fp32(gate_bias), "up_bias": target.fp32(up_bias)}
    return _run(functools.partial(gated.glu, activation=activation), x, gate, up, *_where(groups), **biases)


def _dglu(
    dy: Array, down: Any, gate_h: Any, up_h: Array, row_weight: Any, groups: Groups, activation: Activation
) -> Any:
    kernel, whole = functools.partial(gated.dglu, activation=activation), quantized.whole(down, dy.dtype)
    return _run(kernel, dy, whole, gate_h, up_h, *_where(groups), row_weight=target.fp32(row_weight))


BACKEND = Backend(_matmul, _weight_gradient, _glu, _dglu, platform="tpu")
