"""Rows times the weights of their groups, and gradients of inputs: the same with weights transposed in the core."""

from __future__ import annotations

from typing import Any

import jax
from jaxtyping import Array, Float, Int

from moejax.kernels.chips import ChipSpec
from moejax.kernels.grouped_matmul.pallas_tpu import rows
from moejax.kernels.grouped_matmul.pallas_tpu.item import Chunk, Operands
from moejax.kernels.grouped_matmul.tiling import Tiles
from moejax.kernels.quantized import Quantized


def matmul(
    xs: tuple[Float[Array, "M K"], ...],
    ws: tuple[Float[Array, "G _ _"] | Quantized, ...],
    group_sizes: Int[Array, " G"],
    start: Int[Array, ""],
    *,
    transpose_w: bool = False,
    bias: Float[Array, "G N"] | None = None,
    out_dtype: jax.typing.DTypeLike,
    chip: ChipSpec,
    tiles: Tiles | None = None,
    interpret: Any = False,
) -> Float[Array, "M N"]:
    """The sum over pairs of x and w; two pairs are the input gradient of a gated layer, in one pass.

    Args:
      xs: [M, K] each. Group g owns the group_sizes[g] rows after those of the groups before it, the first from row `start`.
      ws: [G, K, N] each, or [G, N, K] with `transpose_w`. Eight-bit weights are not taken transposed.
      bias: f32[G, N], added before rounding.
      tiles: sizes other than the static rule's.
      interpret: False, or what pallas_call takes to run without a chip.

    Returns:
      [M, N]. Rows of no group are unspecified: select, never multiply.
    """
    weights, scales = rows.unpacked(ws, transpose_w)
    columns = (*scales, *(() if bias is None else (bias[:, None, :],)))

    def part(chunk: Chunk):
        total = None
        for i in range(len(xs)):
            y = chunk.product(i, i)
            y = y * chunk.column(i) if scales else y
            total = y if total is None else total + y
        assert total is not None
        return (total if bias is None else total + chunk.column(len(scales)),), None

    operands = Operands(xs, weights, columns)
    kernel = "input_gradient" if transpose_w else "matmul"
    (y,), _ = rows.call(
        part, operands, group_sizes, start, kernel=kernel,
        outputs=(out_dtype,), transposed=transpose_w, chip=chip, tiles=tiles, interpret=interpret,
    )  # fmt: skip
    return y
