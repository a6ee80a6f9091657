"""The first half of an expert and its gradient, each in one pass: nothing of [M, F] is written that is not kept."""

from __future__ import annotations

from typing import Any

from jaxtyping import Array, Float, Int

from moejax.kernels.activations import Activation
from moejax.kernels.chips import ChipSpec
from moejax.kernels.grouped_matmul.pallas_tpu import rows
from moejax.kernels.grouped_matmul.pallas_tpu.item import Chunk, Operands
from moejax.kernels.grouped_matmul.tiling import Tiles
from moejax.kernels.quantized import Quantized


def glu(
    x: Float[Array, "M K"],
    gate: Float[Array, "G K F"] | Quantized | None,
    up: Float[Array, "G K F"] | Quantized,
    group_sizes: Int[Array, " G"],
    start: Int[Array, ""],
    *,
    activation: Activation,
    gate_bias: Float[Array, "G F"] | None = None,
    up_bias: Float[Array, "G F"] | None = None,
    chip: ChipSpec,
    tiles: Tiles | None = None,
    interpret: Any = False,
) -> tuple[Float[Array, "M F"], Float[Array, "M F"] | None, Float[Array, "M F"]]:
    """The activation of x @ gate and x @ up, and both of them before it.

    Args:
      gate: None where the activation has one factor. Both or neither are eight-bit.
      gate_bias, up_bias: f32[G, F]. Of a gated kind both or neither.

    Returns:
      (a, h_gate, h_up) in x's dtype; a is made in fp32 of the rounded h, as a backward pass will make it again.
    """
    factors = (up,) if gate is None else (gate, up)
    biases = tuple(b[:, None, :] for b in (gate_bias, up_bias) if b is not None)
    weights, scales = rows.unpacked(factors, False)
    number = len(factors)

    def part(chunk: Chunk):
        h = []
        for i in range(number):
            y = chunk.product(0, i)
            y = y * chunk.column(i) if scales else y
            h.append((y + chunk.column(len(scales) + i) if biases else y).astype(x.dtype))
        a = activation.value(h[0] if number == 2 else None, h[-1])
        return (a, *h), None

    operands = Operands((x,), weights, (*scales, *biases))
    (a, *h), _ = rows.call(
        part, operands, group_sizes, start,
        kernel="glu", outputs=(x.dtype,) * (1 + number), chip=chip, tiles=tiles, interpret=interpret,
    )  # fmt: skip
    return a, h[0] if number == 2 else None, h[-1]


def dglu(
    dy: Float[Array, "M D"],
    down: Float[Array, "G F D"],
    h_gate: Float[Array, "M F"] | None,
    h_up: Float[Array, "M F"],
    group_sizes: Int[Array, " G"],
    start: Int[Array, ""],
    *,
    activation: Activation,
    row_weight: Float[Array, " M"] | None = None,
    chip: ChipSpec,
    tiles: Tiles | None = None,
    interpret: Any = False,
) -> tuple[Float[Array, "M F"] | None, Float[Array, "M F"], Float[Array, "M F"], Float[Array, " M"] | None]:
    """From the cotangent of y = row_weight * (a @ down) to those of what the activation was made of.

    Args:
      row_weight: f32[M], a factor on each row of y.

    Returns:
      (dh_gate, dh_up, row_weight * a, dweight) with dweight f32[M], the gradient of row_weight, made without y. Rows of no group are
      unspecified in all of them.
    """
    cells = (h_up,) if h_gate is None else (h_gate, h_up)

    def part(chunk: Chunk):
        da = chunk.product(0, 0)
        gate, up = None if h_gate is None else chunk.cell(0), chunk.cell(len(cells) - 1)
        a, term = activation.value(gate, up), None
        if chunk.factor is not None:
            term, da = da * a, da * chunk.factor
            a = a * chunk.factor
        d_gate, d_up = activation.gradient(gate, up, da)
        return (*(() if h_gate is None else (d_gate,)), d_up, a), term

    factor = None if row_weight is None else row_weight[None, :]
    operands = Operands((dy,), (down,), cells=cells, factor=factor)
    (*dh, a), dweight = rows.call(
        part, operands, group_sizes, start,
        outputs=(h_up.dtype,) * (len(cells) + 1), sums=factor is not None, transposed=True,
        kernel="dglu",
        chip=chip, tiles=tiles, interpret=interpret,
    )  # fmt: skip
    return None if h_gate is None else dh[0], dh[-1], a, dweight if factor is not None else None
