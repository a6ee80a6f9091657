"""The gradient of a grouped matmul's weights: for every group the contraction of its rows of x and dy."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from moejax import compat
from moejax.kernels import tuned
from moejax.kernels.chips import ChipSpec
from moejax.kernels.grouped_matmul.pallas_gpu import launch, ring, store, tasks
from moejax.kernels.grouped_matmul.pallas_gpu.tiles import (
    ALIGNED,
    CONSUMERS,
    DEPTH,
    ROWS,
    WARPGROUP_ROWS,
    Tiles,
    choose,
    piece,
    require,
)


def weight_gradient(
    x: Float[Array, "M K"],
    dy: Float[Array, "M N"],
    group_sizes: Int[Array, " G"],
    start: Int[Array, ""],
    *,
    out_dtype: DTypeLike,
    chip: ChipSpec,
    tiles: Tiles | None = None,
    interpret: Any = False,
) -> Float[Array, "G K N"]:
    """x[rows of g].T @ dy[rows of g] for every group g, accumulated in fp32; exactly zero for an empty group.

    Both operands are read as they lie, rows outermost. Steps inside a group are not masked; behind its last row both operands
    become zero in shared memory, by selection, so that what lies there may be anything.
    """
    (rows, height), width, groups = x.shape, dy.shape[1], group_sizes.shape[0]
    if rows == 0:
        return jnp.zeros((groups, height, width), out_dtype)
    require(x, dy)
    asked = tuned.problem(
        chip, "weight_gradient", x.dtype, pairs=1, depth=height, columns=width, rows=rows, groups=groups
    )
    tiles = choose(asked, chip, tiles)
    down, across = -(-height // ROWS), -(-width // tiles.columns)

    def body(
        spans: Any,
        x: Any,
        dy: Any,
        dw: Any,
        *,
        x_slots: Any,
        dy_slots: Any,
        dw_slots: Any,
        turns: ring.Ring,
        masked: Any,
    ):
        def place(task: jax.Array) -> tuple[jax.Array, ...]:
            """Group, first row and column of the tile of its gradient, first and last row of the group, and its steps' begin."""
            group, tile = lax.div(task, jnp.int32(down * across)), lax.rem(task, jnp.int32(down * across))
            row, column = lax.div(tile, jnp.int32(across)) * ROWS, lax.rem(tile, jnp.int32(across)) * tiles.columns
            return group, row, column, spans[0, group], spans[1, group]

        def steps_of(first: jax.Array, stop: jax.Array) -> tuple[jax.Array, jax.Array]:
            """The row at which a group's first step begins, and how many steps it takes."""
            begin = first & -ALIGNED
            return begin, jnp.where(stop > first, lax.div(stop - begin + (DEPTH - 1), jnp.int32(DEPTH)), 0)

        def produce() -> None:
            def fetch_tile(task: jax.Array, turn: jax.Array) -> jax.Array:
                _, row, column, first, stop = place(task)
                begin, steps = steps_of(first, stop)

                def load(k: jax.Array, slot: jax.Array) -> None:
                    deep, loaded = pl.ds(begin + k * DEPTH, DEPTH), turns.loaded.at[slot]
                    plgpu.copy_gmem_to_smem(x.at[deep, pl.ds(row, ROWS)], x_slots.at[slot], loaded)
                    plgpu.copy_gmem_to_smem(dy.at[deep, pl.ds(column, tiles.columns)], dy_slots.at[slot], loaded)

                return ring.fill(turns, turn, steps, load)

            ring.drain(turns, launch.each_task(groups * down * across, fetch_tile))

        def consume(warpgroup: jax.Array) -> None:
            above = warpgroup * WARPGROUP_ROWS

            def select(slot: jax.Array, first: jax.Array, stop: jax.Array) -> None:
                """Zeros in a slot outside its rows [first, stop): one consumer has x, the other dy, and both wait for both."""
                for part, slots in enumerate((x_slots, dy_slots)):
                    pl.when(warpgroup == part)(lambda slots=slots: _keep(slots.at[slot], first, stop))
                plgpu.commit_smem()
                plgpu.barrier_arrive(masked)
                plgpu.barrier_wait(masked)

            def finish_tile(task: jax.Array, turn: jax.Array) -> jax.Array:
                group, row, column, first, stop = place(task)
                begin, steps = steps_of(first, stop)

                def accumulate(tile: Any) -> jax.Array:
                    def multiply(k: jax.Array, slot: jax.Array) -> None:
                        here = begin + k * DEPTH
                        partly = (here < first) | (here + DEPTH > stop)
                        pl.when(partly)(lambda: select(slot, first - here, stop - here))
                        x_tile = compat.transposed_ref(x_slots.at[slot, :, pl.ds(above, WARPGROUP_ROWS)])
                        plgpu.wgmma(tile, x_tile, dy_slots.at[slot])

                    ring.empty(turns, turn, steps, multiply)
                    return tile[...]

                tile = pl.run_scoped(accumulate, plgpu.WGMMAAccumulatorRef((WARPGROUP_ROWS, tiles.columns)))
                pl.when(steps > 0)(lambda: ring.release(turns, turn + steps))
                out = store.target(dw.at[group], row + above, jnp.int32(0), jnp.int32(height))
                store.begin()
                for number, left in enumerate(range(0, tiles.columns, piece(out_dtype))):
                    part = tile[:, left : left + piece(out_dtype)].astype(out_dtype)
                    store.put(dw_slots.at[warpgroup], number, part, out, column + left)
                return turn + steps

            launch.each_task(groups * down * across, finish_tile)
            store.end()

        launch.roles(produce, consume)

    scratch = {
        "x_slots": launch.staged(tiles.stages, DEPTH, ROWS, x.dtype),
        "dy_slots": launch.staged(tiles.stages, DEPTH, tiles.columns, dy.dtype),
        "dw_slots": store.staging(out_dtype),
        "turns": ring.barriers(tiles.stages, transfers=2),
        "masked": plgpu.Barrier(num_arrivals=CONSUMERS),
    }
    out = (jax.ShapeDtypeStruct((groups, height, width), out_dtype),)
    operands = (tasks.spans(group_sizes, start), x, dy)
    return launch.run(body, operands, out, scratch, chip, "grouped_weight_gradient", interpret)[0]


def _keep(slot: Any, first: jax.Array, stop: jax.Array) -> None:
    """Rows [first, stop) of a slot as they are, zeros in the others; few columns at a time, since the accumulator is in registers."""
    for left in range(0, slot.shape[1], DEPTH):
        part = slot.at[:, pl.ds(left, DEPTH)]
        row = plgpu.broadcasted_iota(jnp.int32, part.shape, 0, layout=plgpu.Layout.WGMMA)
        part[...] = jnp.where((row >= first) & (row < stop), part[...], jnp.zeros((), slot.dtype))
