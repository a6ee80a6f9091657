"""The only file that knows that jax has versions (0.10 to 0.12)."""

from __future__ import annotations

import jax


def varying_axes(x: jax.Array) -> frozenset[str]:
    """Mesh axes over which x differs between devices inside shard_map."""
    kind = jax.typeof(x)
    return frozenset(kind.mat.varying if hasattr(kind, "mat") else kind.vma)


def quick_compile() -> dict[str, int] | None:
    """Compiler options for what runs once: on CPU, compiling random bits takes longer than drawing them ever will."""
    return {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
