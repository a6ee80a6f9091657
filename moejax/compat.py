"""The only file that knows that jax has versions (0.10 to 0.12)."""

from __future__ import annotations

import jax


def varying_axes(x: jax.Array) -> frozenset[str]:
    """Mesh axes over which x differs between devices inside shard_map."""
    kind = jax.typeof(x)
    return frozenset(kind.mat.varying if hasattr(kind, "mat") else kind.vma)
