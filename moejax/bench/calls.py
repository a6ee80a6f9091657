"""The kernel calls of a layer of experts, by name: what is compiled, timed and tuned."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from moejax.bench.shapes import Shape
from moejax.kernels.chips import ChipSpec
from moejax.kernels.quantized import Quantized

BF16, F32 = jnp.bfloat16, jnp.float32
FUNCTIONS = {
    "tpu": ("down", "glu", "glu int8", "dx", "dglu", "dw up", "dw down"),
    "gpu": ("down", "glu", "dx", "dw up", "dw down"),
}
"""By platform."""


def arguments(s: Shape, name: str, make: Callable[..., Any]) -> tuple[Any, ...]:
    """Shapes of a function's arrays, before `group_sizes` and `start`."""
    rows_d, rows_f = make(s.rows, s.width), make(s.rows, s.hidden)
    into, out = make(s.experts, s.width, s.hidden), make(s.experts, s.hidden, s.width)
    small = Quantized(make(s.experts, s.width, s.hidden, dtype=jnp.int8), make(s.experts, 1, s.hidden, dtype=F32))
    return {
        "down": (rows_f, out),
        "glu": (rows_d, into, into),
        "glu int8": (rows_d, small, small),
        "dx": (rows_f, rows_f, into, into),
        "dglu": (rows_d, out, rows_f, rows_f, make(s.rows, dtype=F32)),
        "dw up": (rows_d, rows_f),
        "dw down": (rows_f, rows_d),
    }[name]


def function(kernels: Any, s: Shape, name: str, chip: ChipSpec, **options: Any) -> Callable[..., Any]:
    """(arrays, sizes, start) -> outputs, of the module `pallas_tpu` or `pallas_gpu`; options are `tiles` and `interpret`."""
    act, common = s.activation, {"chip": chip, **options}
    k = kernels
    return {
        "down": lambda a, z, t: k.matmul((a[0],), (a[1],), z, t, out_dtype=a[0].dtype, **common),
        "glu": lambda a, z, t: k.glu(*a, z, t, activation=act, **common),
        "glu int8": lambda a, z, t: k.glu(*a, z, t, activation=act, **common),
        "dx": lambda a, z, t: k.matmul(a[:2], a[2:], z, t, transpose_w=True, out_dtype=a[0].dtype, **common),
        "dglu": lambda a, z, t: k.dglu(*a[:4], z, t, activation=act, row_weight=a[4], **common),
        "dw up": lambda a, z, t: k.weight_gradient(*a, z, t, out_dtype=a[0].dtype, **common),
        "dw down": lambda a, z, t: k.weight_gradient(*a, z, t, out_dtype=a[0].dtype, **common),
    }[name]


def flops(s: Shape, name: str) -> int:
    """Useful floating-point operations of a call."""
    return 2 * s.rows * s.width * s.hidden * (2 if name in ("glu", "glu int8", "dx") else 1)
