"""The frame of every kernel that makes rows from rows: y[r] = f(x[r] @ w[group of r]).

Tiles of x and y are piped by Pallas. Weights are fetched here, the next groups' while this one's rows pass: a pipeline that looks one tile
ahead would stand still at each change of group. A grid is (cores, passes over the rows, items); in a pass all rows meet some columns.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from moejax import collectives, compat
from moejax.errors import ConfigError
from moejax.kernels import tuned
from moejax.kernels.chips import ChipSpec
from moejax.kernels.grouped_matmul import tiling
from moejax.kernels.grouped_matmul.pallas_tpu import work
from moejax.kernels.grouped_matmul.pallas_tpu.fetch import Plan
from moejax.kernels.grouped_matmul.pallas_tpu.item import F32, Operands, Part, step
from moejax.kernels.grouped_matmul.tiling import LANES, Tiles, ceil_to
from moejax.kernels.quantized import Quantized


def unpacked(ws: tuple[Any, ...], transposed: bool) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
    """Weights as arrays, and the scales of those that are eight-bit."""
    if any(isinstance(w, Quantized) for w in ws) and not (all(isinstance(w, Quantized) for w in ws) and not transposed):
        raise ConfigError(
            f"weights of types {[type(w).__name__ for w in ws]}, transpose_w={transposed}: eight-bit weights come together and are not "
            "taken transposed; quantize all of them, and take gradients with the weights they were made from"
        )
    if not isinstance(ws[0], Quantized):
        return tuple(ws), ()
    return tuple(w.values for w in ws), tuple(w.scale for w in ws)


def call(
    part: Part,
    operands: Operands,
    group_sizes: Array,
    start: Array,
    *,
    kernel: str,
    outputs: tuple[Any, ...],
    sums: bool = False,
    transposed: bool = False,
    chip: ChipSpec,
    tiles: Tiles | None,
    interpret: Any,
) -> tuple[tuple[Array, ...], Array | None]:
    """Outputs [M, N] of the given types, and f32[M] sums over columns where asked for."""
    operands, group_sizes, start = collectives.vary_together(operands, group_sizes, start)
    x, w = operands.wide[0], operands.weights[0]
    m, n = x.shape[0], w.shape[1 if transposed else 2]
    if m == 0 or n == 0:
        return tuple(jnp.zeros_like(x, shape=(m, n), dtype=d) for d in outputs), jnp.zeros_like(
            x, shape=(m,), dtype=F32
        )
    taken = demand(operands, outputs, transposed, sums)
    asked = tuned.problem(
        chip, kernel, w.dtype, pairs=len(operands.weights), depth=taken.contracted, columns=n, rows=m, groups=w.shape[0]
    )
    tiles = tuned.choose(asked, tiles, Tiles, lambda: tiling.for_rows(taken, chip))
    share_rows = -(-m // tiles.rows) >= 4 * chip.cores
    cores = chip.cores if share_rows or n > tiles.columns else 1
    plan = Plan(m, n, tiles, cores, share_rows, transposed, bool(interpret))
    items = work.make(group_sizes, start, m, tiles.rows, cores, share_rows=share_rows)
    out = [compat.shaped_like(x, (m, n), dtype) for dtype in outputs]
    if sums:
        out.append(compat.shaped_like(x, (plan.passes, 1, m), F32))
    specs = _specs(plan, operands, len(outputs), sums)
    buffers = [_buffer(plan, w) for w in operands.weights]
    flat, tree = jax.tree.flatten(operands)

    def body(*refs: Any) -> None:
        cut = len(items), len(items) + len(flat), len(items) + len(flat) + len(out)
        listed, read = work.Work(*refs[: cut[0]]), jax.tree.unflatten(tree, refs[cut[0] : cut[1]])
        step(plan, part, listed, read, refs[cut[1] : cut[2]], refs[cut[2] : -1], refs[-1], sums)

    done = pl.pallas_call(
        body,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(items),
            grid=(cores, plan.core_passes, jnp.max(items.number)),
            in_specs=specs[0],
            out_specs=specs[1],
            scratch_shapes=[*buffers, pltpu.SemaphoreType.DMA((tiles.slots, len(buffers)))],
        ),
        out_shape=tuple(out),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=chip.memory,
        ),
        cost_estimate=cost(2 * m * sum(w.shape[1] * w.shape[2] for w in operands.weights), flat, out),
        interpret=interpret,
    )(*items, *flat)
    return tuple(done[: len(outputs)]), jnp.sum(done[-1], axis=(0, 1)) if sums else None


def cost(flops: int, read: Iterable[Any], written: Iterable[Any]) -> pl.CostEstimate:
    """What a kernel says of itself to the compiler and to a plan: as if every row of its buffer had a group, each array moved once."""
    moved = sum(a.dtype.itemsize * math.prod(a.shape) for a in (*read, *written))
    return pl.CostEstimate(flops=flops, transcendentals=0, bytes_accessed=moved)


def supports(*operands: Array | jax.ShapeDtypeStruct) -> bool:
    """Any K and N; a contraction too long for a core's memory is refused by the tile rule, which knows the chip."""
    return all(jnp.issubdtype(a.dtype, jnp.floating) or a.dtype == jnp.int8 for a in operands)


def demand(operands: Operands, outputs: tuple[Any, ...], transposed: bool, sums: bool) -> tiling.Demand:
    """What these operands and outputs take of a core's memory, for the tile rule."""
    x, w = operands.wide[0], operands.weights[0]
    cells = sum(a.dtype.itemsize for a in operands.cells) + sum(jnp.dtype(d).itemsize for d in outputs)
    return tiling.Demand(
        rows=x.shape[0],
        groups=w.shape[0],
        columns=w.shape[1 if transposed else 2],
        row_bytes=sum(ceil_to(a.shape[1], LANES) * a.dtype.itemsize for a in operands.wide),
        column_bytes=sum(ceil_to(v.shape[2 if transposed else 1], LANES) * v.dtype.itemsize for v in operands.weights),
        cell_bytes=cells,
        contracted=sum(a.shape[1] for a in operands.wide),
        row_align=LANES if sums or operands.factor is not None else 32 // x.dtype.itemsize,
    )


def _item(plan: Plan, core: Any, i: Any, items: work.Work) -> Any:
    """The item of a core's step; past its last, the last once more."""
    return items.first[core] + jnp.clip(i, 0, jnp.maximum(items.number[core] - 1, 0))


def _specs(plan: Plan, operands: Operands, outputs: int, sums: bool) -> tuple[list[Any], list[Any]]:
    """Where the blocks of each operand and output are, for a grid point (core, pass, step)."""
    t = plan.tiles

    def at(index: Callable[..., tuple[Any, ...]]) -> Callable[..., tuple[Any, ...]]:
        def place(core: Any, turn: Any, i: Any, *refs: Any) -> tuple[Any, ...]:
            items = work.Work(*refs)
            item = _item(plan, core, i, items)
            return index(items, item, plan.tile_of_columns(core, turn))

        return place

    cell = pl.BlockSpec((t.rows, t.columns), at(lambda items, item, n: (items.tile[item], n)))
    ins: list[Any] = [
        pl.BlockSpec((t.rows, a.shape[1]), at(lambda items, item, n: (items.tile[item], 0))) for a in operands.wide
    ]
    ins += [pl.BlockSpec(memory_space=pl.ANY)] * len(operands.weights)
    column = pl.BlockSpec((None, 1, t.columns), at(lambda items, item, n: (items.group[items.run[item]], 0, n)))
    ins += [column] * len(operands.columns) + [cell] * len(operands.cells)
    if operands.factor is not None:
        ins.append(pl.BlockSpec((1, t.rows), at(lambda items, item, n: (0, items.tile[item]))))
    outs: list[Any] = [cell] * outputs
    if sums:
        outs.append(pl.BlockSpec((None, 1, t.rows), at(lambda items, item, n: (n, 0, items.tile[item]))))
    return ins, outs


def _buffer(plan: Plan, w: Array) -> Any:
    shape = (plan.tiles.columns, w.shape[2]) if plan.transposed else (w.shape[1], plan.tiles.columns)
    return pltpu.VMEM((plan.tiles.slots, *shape), w.dtype)
