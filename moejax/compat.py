"""The only file that knows that jax has versions (0.10 to 0.12)."""

from __future__ import annotations

import jax


def varying_axes(x: jax.Array) -> frozenset[str]:
    """Mesh axes over which x differs between devices inside shard_map."""
    kind = jax.typeof(x)
    return frozenset(kind.mat.varying if hasattr(kind, "mat") else kind.vma)


OVERLAP = {"xla_tpu_enable_async_all_to_all": "true", "xla_tpu_enable_all_experimental_scheduler_features": "true"}
"""Options of the TPU compiler under which exchanges start early and end late, with computation in between."""


def overlapping(platform: str) -> dict[str, dict[str, str]]:
    """What jax.jit is told so that collectives run under computation, on a platform whose compiler has to be asked."""
    return {"compiler_options": OVERLAP} if platform == "tpu" else {}


def quick_compile() -> dict[str, int] | None:
    """Compiler options for what runs once: on CPU, compiling random bits takes longer than drawing them ever will."""
    return {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
