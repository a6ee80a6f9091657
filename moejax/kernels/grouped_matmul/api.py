"""One signature for the grouped matmul, and the table of its backends."""

from __future__ import annotations

from collections.abc import Callable

from jaxtyping import Array, Float, Int

from moejax import sharding
from moejax.errors import ConfigError
from moejax.kernels.grouped_matmul import blocked, reference, xla

BACKENDS: dict[str, Callable[[Array, Array, Array], Array]] = {
    "reference": reference.grouped_matmul,
    "blocked": blocked.grouped_matmul,
    "xla": xla.grouped_matmul,
}

BY_PLATFORM = {"cpu": "blocked"}
"""What `auto` means where measurements say so; elsewhere it is `xla`."""


def pick(impl: str, platform: str | None = None) -> str:
    """The backend's name for `impl`, with `auto` resolved for the platform."""
    if impl == "auto":
        return BY_PLATFORM.get(platform or sharding.platform(), "xla")
    if impl not in BACKENDS:
        raise ConfigError(f"model.moe.kernel={impl!r} is not a backend; choose auto or one of {', '.join(BACKENDS)}")
    return impl


def grouped_matmul(
    x: Float[Array, "M K"],
    w: Float[Array, "G _ _"],
    group_sizes: Int[Array, " G"],
    *,
    transpose_w: bool = False,
    impl: str = "auto",
) -> Float[Array, "M N"]:
    """Rows of x, contiguous by group, each times the weight of its group.

    Args:
      x: [M, K]. Group g owns the group_sizes[g] rows after those of the groups before it.
      w: [G, K, N], or [G, N, K] with `transpose_w`.
      group_sizes: [G], int32, sum at most M. A group may be empty; its weight gradient is then exactly zero.
      impl: a name in BACKENDS, or auto.

    Returns:
      [M, N] in x's dtype, accumulated in fp32. Rows past the last group are unspecified: select, never multiply.
    """
    return BACKENDS[pick(impl)](x, w.swapaxes(1, 2) if transpose_w else w, group_sizes)
