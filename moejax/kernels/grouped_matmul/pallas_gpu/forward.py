"""The grouped matmul, forward and towards its input: rows times the weight of their group, one or two pairs summed."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from moejax import compat
from moejax.kernels import tuned
from moejax.kernels.chips import ChipSpec
from moejax.kernels.grouped_matmul.pallas_gpu import bias as biases
from moejax.kernels.grouped_matmul.pallas_gpu import launch, ring, store, tasks
from moejax.kernels.grouped_matmul.pallas_gpu.tiles import DEPTH, ROWS, WARPGROUP_ROWS, Tiles, choose, piece, require


def matmul(
    xs: tuple[Float[Array, "M _"], ...],
    ws: tuple[Float[Array, "G _ _"], ...],
    group_sizes: Int[Array, " G"],
    start: Int[Array, ""],
    *,
    transpose_w: bool = False,
    bias: Float[Array, "G N"] | None = None,
    out_dtype: DTypeLike,
    chip: ChipSpec,
    tiles: Tiles | None = None,
    interpret: Any = False,
) -> Float[Array, "M N"]:
    """The sum over pairs of x @ w[group of the row], plus the group's bias.

    Args:
      xs: one or two [M, K]; K may differ. Group g owns the group_sizes[g] rows after those of the groups before it.
      ws: as many [G, K, N], or [G, N, K] with `transpose_w`: read as they lie, nothing is transposed in memory.
      start: first row of group 0.
      out_dtype: bf16 or fp32.
      tiles: a tuned choice; None for the static rule.

    Returns:
      [M, N], accumulated in fp32. Rows before `start` and past the last group are unspecified.
    """
    rows, width = xs[0].shape[0], ws[0].shape[1 if transpose_w else 2]
    if rows == 0:
        return jnp.zeros((0, width), out_dtype)
    require(*xs, *ws)
    asked = tuned.problem(
        chip, "input_gradient" if transpose_w else "matmul", ws[0].dtype,
        pairs=len(xs), depth=sum(x.shape[1] for x in xs), columns=width, rows=rows, groups=ws[0].shape[0],
    )  # fmt: skip
    tiles = choose(asked, chip, tiles)
    work = tasks.of_rows(group_sizes, start, rows, width, tiles.columns, tiles.panel)
    steps = [-(-x.shape[1] // DEPTH) for x in xs]
    pairs = len(xs)

    def body(
        table: Any,
        count: Any,
        *refs: Any,
        x_slots: Any,
        w_slots: Any,
        y_slots: Any,
        turns: ring.Ring,
        bias_slots: Any = None,
    ):
        x_refs, w_refs, bias_refs, y = refs[:pairs], refs[pairs : 2 * pairs], refs[2 * pairs : -1], refs[-1]

        def produce() -> None:
            def fetch_tile(task: jax.Array, turn: jax.Array) -> jax.Array:
                at = tasks.read(table, task)
                across = pl.ds(at.column, tiles.columns)
                for x, w, some in zip(x_refs, w_refs, steps, strict=True):

                    def load(k: jax.Array, slot: jax.Array, x: Any = x, w: Any = w) -> None:
                        deep, loaded = pl.ds(k * DEPTH, DEPTH), turns.loaded.at[slot]
                        block = w.at[at.group, across, deep] if transpose_w else w.at[at.group, deep, across]
                        plgpu.copy_gmem_to_smem(x.at[pl.ds(at.row, ROWS), deep], x_slots.at[slot], loaded)
                        plgpu.copy_gmem_to_smem(block, w_slots.at[slot], loaded)

                    turn = ring.fill(turns, turn, some, load)
                return turn

            ring.drain(turns, launch.each_task(count[0], fetch_tile))

        def consume(warpgroup: jax.Array) -> None:
            above = warpgroup * WARPGROUP_ROWS
            own_bias = None if bias_slots is None else bias_slots.of(warpgroup)

            def finish_tile(task: jax.Array, turn: jax.Array) -> jax.Array:
                at = tasks.read(table, task)
                if own_bias is not None:
                    biases.fetch(bias_refs, at.group, at.column, own_bias)

                def accumulate(tile: Any) -> jax.Array:
                    def multiply(_: jax.Array, slot: jax.Array) -> None:
                        w = compat.transposed_ref(w_slots.at[slot]) if transpose_w else w_slots.at[slot]
                        plgpu.wgmma(tile, x_slots.at[slot, pl.ds(above, WARPGROUP_ROWS)], w)

                    ring.empty(turns, turn, sum(steps), multiply)
                    return tile[...]

                tile = pl.run_scoped(accumulate, plgpu.WGMMAAccumulatorRef((WARPGROUP_ROWS, tiles.columns)))
                turn += sum(steps)
                ring.release(turns, turn)
                if own_bias is not None:
                    plgpu.barrier_wait(own_bias.arrived)
                out = store.target(y, at.row + above, at.first, at.stop)
                store.begin()
                for number, left in enumerate(range(0, tiles.columns, piece(out_dtype))):
                    part = tile[:, left : left + piece(out_dtype)]
                    if own_bias is not None:
                        part = biases.add(part, own_bias, 0, left, interpret)
                    store.put(y_slots.at[warpgroup], number, part.astype(out_dtype), out, at.column + left)
                return turn

            launch.each_task(count[0], finish_tile)
            store.end()

        launch.roles(produce, consume)

    weight_slot = (tiles.columns, DEPTH) if transpose_w else (DEPTH, tiles.columns)
    scratch = {
        "x_slots": launch.staged(tiles.stages, ROWS, DEPTH, xs[0].dtype),
        "w_slots": launch.staged(tiles.stages, *weight_slot, ws[0].dtype),
        "y_slots": store.staging(out_dtype),
        "turns": ring.barriers(tiles.stages, transfers=2),
    }
    extra = () if bias is None else (bias,)
    if bias is not None:
        scratch["bias_slots"] = biases.slots(1, tiles.columns, bias.dtype)
    out = (jax.ShapeDtypeStruct((rows, width), out_dtype),)
    return launch.run(
        body, (work.table, work.total, *xs, *ws, *extra), out, scratch, chip, "grouped_matmul", interpret
    )[0]
