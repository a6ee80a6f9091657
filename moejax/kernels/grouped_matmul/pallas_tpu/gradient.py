"""The gradient of weights: for each group, x^T @ dy over its rows.

A core takes some tiles [depth, columns] of the gradient, and for each of them all rows. The sum of a group stays in memory, in fp32,
while its rows pass; it is rounded and sent when the last of them has.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from moejax import collectives, compat
from moejax.kernels import tuned
from moejax.kernels.chips import ChipSpec
from moejax.kernels.grouped_matmul import tiling
from moejax.kernels.grouped_matmul.pallas_tpu import rows, work
from moejax.kernels.grouped_matmul.pallas_tpu.item import F32, dot
from moejax.kernels.grouped_matmul.tiling import Tiles


def weight_gradient(
    x: Float[Array, "M K"],
    dy: Float[Array, "M N"],
    group_sizes: Int[Array, " G"],
    start: Int[Array, ""],
    *,
    accumulate_into: Float[Array, "G K N"] | None = None,
    out_dtype: jax.typing.DTypeLike,
    chip: ChipSpec,
    tiles: Tiles | None = None,
    interpret: Any = False,
) -> Float[Array, "G K N"]:
    """x^T @ dy over the rows of each group, summed in fp32; exactly zero for a group without rows.

    Args:
      start: the first row of group 0. Rows of no group may hold anything.
      accumulate_into: [G, K, N] in the output's type, added before rounding; its memory becomes the output's.
    """
    operands = (x, dy, group_sizes, start, *(() if accumulate_into is None else (accumulate_into,)))
    x, dy, group_sizes, start, *into = collectives.vary_together(*operands)
    shape = group_sizes.shape[0], x.shape[1], dy.shape[1]
    if 0 in (*x.shape, *dy.shape):
        return into[0] if into else jnp.zeros_like(x, shape=shape, dtype=out_dtype)
    written = jnp.dtype(out_dtype).itemsize * (1 + len(into))
    sizes = (x.shape[0], shape[1], shape[2], shape[0])
    asked = tuned.problem(
        chip, "weight_gradient", x.dtype, pairs=1, depth=shape[1], columns=shape[2], rows=x.shape[0], groups=shape[0]
    )
    rule = functools.partial(tiling.for_gradient, *sizes, x.dtype.itemsize, written, chip)
    tiles = tuned.choose(asked, tiles, Tiles, rule)
    plan = Plan(-(-shape[1] // tiles.depth), -(-shape[2] // tiles.columns), tiles, chip.cores)
    items = work.make(group_sizes, start, x.shape[0], tiles.rows, plan.cores, share_rows=False, empty=True)
    ins, out = _specs(plan, len(into))
    made = compat.shaped_like(x, shape, out_dtype)
    return pl.pallas_call(
        lambda *refs: _step(plan, *refs),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(items),
            grid=(plan.cores, plan.core_passes, items.number[0]),
            in_specs=ins,
            out_specs=out,
            scratch_shapes=[
                pltpu.VMEM((tiles.depth, tiles.block), x.dtype),
                pltpu.VMEM((tiles.depth, tiles.columns), F32),
            ],
        ),
        out_shape=made,
        # The interpreter pads outputs to whole blocks, and cannot then share their memory.
        input_output_aliases={len(items) + 2: 0} if into and not interpret else {},
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=chip.memory
        ),
        cost_estimate=rows.cost(2 * x.shape[0] * shape[1] * shape[2], (x, dy, *into), (made,)),
        interpret=interpret,
    )(*items, x, dy, *into)


@dataclasses.dataclass(frozen=True)
class Plan:
    """Tiles of the gradient of a group, and who takes them."""

    deep: int
    wide: int
    tiles: Tiles
    chip_cores: int

    @property
    def cores(self) -> int:
        return min(self.chip_cores, self.deep * self.wide)

    @property
    def core_passes(self) -> int:
        return -(-self.deep * self.wide // self.cores)

    def tile(self, core: Any, turn: Any) -> tuple[Any, Any]:
        """Of depth and of columns; past a core's last, the last once more."""
        place = jnp.minimum(core * self.core_passes + turn, self.deep * self.wide - 1)
        return place // self.wide, place % self.wide


def _specs(plan: Plan, into: int) -> tuple[list[Any], Any]:
    t = plan.tiles

    def at(index: Callable[..., tuple[Any, ...]]) -> Callable[..., tuple[Any, ...]]:
        def place(core: Any, turn: Any, i: Any, *refs: Any) -> tuple[Any, ...]:
            items = work.Work(*refs)
            return index(items.tile[i], items.group[items.run[i]], *plan.tile(core, turn))

        return place

    x = pl.BlockSpec((t.rows, t.depth), at(lambda rows, group, d, n: (rows, d)))
    dy = pl.BlockSpec((t.rows, t.columns), at(lambda rows, group, d, n: (rows, n)))
    out = pl.BlockSpec((None, t.depth, t.columns), at(lambda rows, group, d, n: (group, d, n)))
    return [x, dy] + [out] * into, out


def _step(plan: Plan, *refs: Any) -> None:
    """One item: the rows of a group in one tile of rows."""
    items = work.Work(*refs[:6])
    x, dy, *into, out, turned, total = refs[6:]
    t, i = plan.tiles, pl.program_id(2)
    run = items.run[i]
    group, top = items.group[run], items.tile[i] * t.rows
    begin, end = items.bounds[group], items.bounds[group + 1]
    low, high = jnp.maximum(begin - top, 0), jnp.minimum(end - top, t.rows)

    def each_chunk(visit: Callable[[Any], None]) -> None:
        def turn(c: Any, _: None) -> None:
            visit(pl.ds(pl.multiple_of(c * t.chunk, t.chunk), t.chunk))

        lax.fori_loop(0, t.columns // t.chunk, turn, None)

    def clear(columns: Any) -> None:
        total[:, columns] = jnp.zeros((t.depth, t.chunk), F32)

    def block(b: Any, _: None) -> None:
        rows = pl.ds(pl.multiple_of(b * t.block, t.block), t.block)
        row = b * t.block + lax.broadcasted_iota(jnp.int32, (t.block, 1), 0)
        mine = (row >= low) & (row < high)
        opens = (begin >= top) & (b == low // t.block)
        turned[...] = jnp.where(mine, x[rows, :], jnp.zeros((), x.dtype)).T

        def product(columns: Any) -> None:
            cotangents = jnp.where(mine, dy[rows, columns], jnp.zeros((), dy.dtype))
            so_far = jnp.where(opens, 0.0, total[:, columns])
            total[:, columns] = so_far + dot(turned[...], cotangents, (1, 0))

        each_chunk(product)

    @pl.when(end > begin)
    def _() -> None:
        lax.fori_loop(low // t.block, (high + t.block - 1) // t.block, block, None)

    @pl.when(end == begin)
    def _() -> None:
        each_chunk(clear)

    def write(columns: Any) -> None:
        last = total[:, columns] + into[0][:, columns].astype(F32) if into else total[:, columns]
        out[:, columns] = last.astype(out.dtype)

    @pl.when(end <= top + t.rows)
    def _() -> None:
        each_chunk(write)
