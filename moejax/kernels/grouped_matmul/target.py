"""Which chip a kernel is compiled for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from moejax import sharding
from moejax.errors import ConfigError
from moejax.kernels import chips


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
