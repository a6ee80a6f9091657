"""Which chip a kernel is compiled for, and what a backend does where it has no kernel of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from moejax import sharding
from moejax.errors import ConfigError
from moejax.kernels import chips
from moejax.kernels.activations import Activation
from moejax.kernels.grouped_matmul.backend import Backend, Groups


def here(platform: str, interpreted_as: str, interpreter: Callable[[], Any]) -> dict[str, Any]:
    """`chip` and `interpret` for a kernel of `platform`: the mesh's chip where it is of that platform; elsewhere the interpreter, which
    is slow and right, and works as a named chip would."""
    if sharding.platform() != platform:
        return {"chip": chips.CHIPS[interpreted_as], "interpret": interpreter()}
    kind = sharding.device_kind()
    chip = chips.of(kind)
    if chip is None:
        raise ConfigError(
            f"model.moe.kernel=pallas_{platform} on {kind!r}: kernels are compiled for {', '.join(chips.KINDS)}; add a ChipSpec to "
            "moejax/kernels/chips.py, or set kernel=xla"
        )
    return {"chip": chip, "interpret": False}


def fp32(x: Array | None) -> Array | None:
    return None if x is None else x.astype(jnp.float32)


def composed_glu(
    backend: Backend, x: Array, gate: Any, up: Any, gate_bias: Any, up_bias: Any, groups: Groups, activation: Activation
) -> tuple[Array, Array | None, Array]:
    """(a, gate_h, up_h) from plain matmuls: the pre-activations are rounded before they are activated, as a backward pass will."""
    gate_h = None if gate is None else backend.matmul((x,), (gate,), groups, False, gate_bias, x.dtype)
    up_h = backend.matmul((x,), (up,), groups, False, up_bias, x.dtype)
    return activation.value(gate_h, up_h).astype(x.dtype), gate_h, up_h
