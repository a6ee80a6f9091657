"""The first half of an expert layer in one pass over its rows: gate, up, and the activation in the epilogue."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from moejax.kernels import tuned
from moejax.kernels.activations import Activation
from moejax.kernels.chips import ChipSpec
from moejax.kernels.grouped_matmul.pallas_gpu import bias as biases
from moejax.kernels.grouped_matmul.pallas_gpu import launch, ring, store, tasks
from moejax.kernels.grouped_matmul.pallas_gpu.tiles import DEPTH, ROWS, WARPGROUP_ROWS, Tiles, choose, piece, require


def glu(
    x: Float[Array, "M K"],
    gate: Float[Array, "G K F"] | None,
    up: Float[Array, "G K F"],
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
    """a = activation(h_gate, h_up) with h_gate = x @ gate + gate_bias, h_up = x @ up + up_bias, by group.

    h is rounded to x's dtype before the activation, which computes in fp32: the backward pass makes the same a from the h it keeps.

    Returns:
      a, h_gate (None without a gate), h_up in x's dtype. Rows before `start` and past the last group are unspecified.
    """
    rows, width = x.shape[0], up.shape[2]
    weights = (up,) if gate is None else (gate, up)
    outputs = [jax.ShapeDtypeStruct((rows, width), x.dtype) for _ in (None, *weights)]
    extra = tuple(bias for bias in (gate_bias, up_bias) if bias is not None)
    if rows == 0:
        a, *h = (jnp.zeros(o.shape, o.dtype) for o in outputs)
        return a, None if gate is None else h[0], h[-1]
    require(x, *weights)
    parts = len(weights)
    asked = tuned.problem(
        chip, "glu", up.dtype, pairs=parts, depth=x.shape[1], columns=width, rows=rows, groups=up.shape[0]
    )
    tiles = choose(asked, chip, tiles, parts)
    columns, steps = tiles.columns // parts, -(-x.shape[1] // DEPTH)
    work = tasks.of_rows(group_sizes, start, rows, width, columns, tiles.panel)

    def body(
        table: Any,
        count: Any,
        x: Any,
        *refs: Any,
        x_slots: Any,
        w_slots: Any,
        y_slots: Any,
        turns: ring.Ring,
        bias_slots: Any = None,
    ):
        w_refs, bias_refs, outs = refs[:parts], refs[parts : -1 - parts], refs[-1 - parts :]

        def produce() -> None:
            def fetch_tile(task: jax.Array, turn: jax.Array) -> jax.Array:
                at = tasks.read(table, task)

                def load(k: jax.Array, slot: jax.Array) -> None:
                    deep, loaded = pl.ds(k * DEPTH, DEPTH), turns.loaded.at[slot]
                    plgpu.copy_gmem_to_smem(x.at[pl.ds(at.row, ROWS), deep], x_slots.at[slot], loaded)
                    for w, slots in zip(w_refs, w_slots, strict=True):
                        plgpu.copy_gmem_to_smem(w.at[at.group, deep, pl.ds(at.column, columns)], slots.at[slot], loaded)

                return ring.fill(turns, turn, steps, load)

            ring.drain(turns, launch.each_task(count[0], fetch_tile))

        def consume(warpgroup: jax.Array) -> None:
            above = warpgroup * WARPGROUP_ROWS
            own_bias = None if bias_slots is None else bias_slots.of(warpgroup)

            def finish_tile(task: jax.Array, turn: jax.Array) -> jax.Array:
                at = tasks.read(table, task)
                if own_bias is not None:
                    biases.fetch(bias_refs, at.group, at.column, own_bias)

                def accumulate(*h_tiles: Any) -> list[jax.Array]:
                    def multiply(_: jax.Array, slot: jax.Array) -> None:
                        for tile, slots in zip(h_tiles, w_slots, strict=True):
                            plgpu.wgmma(tile, x_slots.at[slot, pl.ds(above, WARPGROUP_ROWS)], slots.at[slot])

                    ring.empty(turns, turn, steps, multiply, in_flight=parts)
                    return [tile[...] for tile in h_tiles]

                h_tiles = pl.run_scoped(
                    accumulate, *(plgpu.WGMMAAccumulatorRef((WARPGROUP_ROWS, columns)) for _ in weights)
                )
                turn += steps
                ring.release(turns, turn)
                if own_bias is not None:
                    plgpu.barrier_wait(own_bias.arrived)
                store.begin()
                for number, left in enumerate(range(0, columns, piece(x.dtype))):
                    h = [tile[:, left : left + piece(x.dtype)] for tile in h_tiles]
                    if own_bias is not None:
                        h = [biases.add(part, own_bias, i, left, interpret) for i, part in enumerate(h)]
                    h = [part.astype(x.dtype) for part in h]
                    a = activation.value(None if gate is None else h[0], h[-1]).astype(x.dtype)
                    for i, (y, values) in enumerate(zip(outs, (a, *h), strict=True)):
                        out = store.target(y, at.row + above, at.first, at.stop)
                        store.put(y_slots.at[warpgroup], number * (1 + parts) + i, values, out, at.column + left)
                return turn

            launch.each_task(count[0], finish_tile)
            store.end()

        launch.roles(produce, consume)

    scratch = {
        "x_slots": launch.staged(tiles.stages, ROWS, DEPTH, x.dtype),
        "w_slots": [launch.staged(tiles.stages, DEPTH, columns, x.dtype) for _ in weights],
        "y_slots": store.staging(x.dtype),
        "turns": ring.barriers(tiles.stages, transfers=1 + parts),
    }
    if extra:
        scratch["bias_slots"] = biases.slots(parts, columns, extra[0].dtype)
    operands = (work.table, work.total, x, *weights, *extra)
    a, *h = launch.run(body, operands, outputs, scratch, chip, "grouped_glu", interpret)
    return a, None if gate is None else h[0], h[-1]
