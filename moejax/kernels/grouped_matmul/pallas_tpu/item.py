"""One item of the work list: a tile of rows against the weights of its group."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array

from moejax.kernels.grouped_matmul.pallas_tpu import work
from moejax.kernels.grouped_matmul.pallas_tpu.fetch import Fetch, Plan
from moejax.kernels.grouped_matmul.tiling import LANES

F32 = jnp.float32


class Operands(NamedTuple):
    """What a kernel reads: arrays outside it, references inside."""

    wide: tuple[Any, ...]
    """[M, K] each: whole rows, contracted with weights."""
    weights: tuple[Any, ...]
    """[G, K, N], or [G, N, K] where they are taken transposed."""
    columns: tuple[Any, ...] = ()
    """f32[G, 1, N] each."""
    cells: tuple[Any, ...] = ()
    """[M, N] each."""
    factor: Any = None
    """f32[1, M]."""


@dataclasses.dataclass(frozen=True)
class Chunk:
    """Some rows and columns of a tile, as a kernel's own part sees them."""

    refs: Operands
    rows: Any
    columns: Any
    transposed: bool
    factor: Array | None
    """f32[rows, 1]."""

    def product(self, x: int, w: int) -> Array:
        """Rows of the x-th wide operand times columns of the w-th weight, in fp32."""
        rows, ref = self.refs.wide[x][self.rows, :], self.refs.weights[w]
        weight = (ref[self.columns, :] if self.transposed else ref[:, self.columns]).astype(rows.dtype)
        return dot(rows, weight, (1, 1 if self.transposed else 0))

    def column(self, i: int) -> Array:
        return self.refs.columns[i][:, self.columns]

    def cell(self, i: int) -> Array:
        return self.refs.cells[i][self.rows, self.columns]


Part = Callable[[Chunk], tuple[tuple[Array, ...], Array | None]]
"""A chunk's outputs, and f32[rows, columns] to be summed over columns, or None."""


def dot(a: Array, b: Array, contract: tuple[int, int]) -> Array:
    """In fp32; what is given in fp32 is multiplied in fp32."""
    precision = lax.Precision.HIGHEST if a.dtype == F32 else lax.Precision.DEFAULT
    return lax.dot_general(
        a, b, (((contract[0],), (contract[1],)), ((), ())), precision=precision, preferred_element_type=F32
    )


def step(
    plan: Plan,
    part: Part,
    items: work.Work,
    operands: Operands,
    outs: tuple[Any, ...],
    buffers: tuple[Any, ...],
    semaphores: Any,
    sums: bool,
) -> None:
    """One item: its tile of rows against its group's columns."""
    core, turn, i = (pl.program_id(axis) for axis in range(3))

    @pl.when(i < items.number[core])
    def _() -> None:
        item = items.first[core] + i
        run = items.run[item]
        fetch = Fetch(plan, items, operands.weights, buffers, semaphores, core)
        place = fetch.place(turn, run)

        @pl.when((i == 0) | (run != items.run[jnp.maximum(item - 1, 0)]))
        def _() -> None:
            fetch.advance(place)

        weights = tuple(buffer.at[place % plan.tiles.slots] for buffer in buffers)
        top, group = items.tile[item] * plan.tiles.rows, items.group[run]
        low = jnp.maximum(items.bounds[group] - top, 0)
        high = jnp.minimum(items.bounds[group + 1] - top, plan.tiles.rows)
        left = plan.columns - plan.tile_of_columns(core, turn) * plan.tiles.columns
        _blocks(plan, part, operands._replace(weights=weights), outs, low, high, left, sums)


def _blocks(
    plan: Plan, part: Part, refs: Operands, outs: tuple[Any, ...], low: Any, high: Any, left: Any, sums: bool
) -> None:
    """The rows low to high of a tile, in blocks and chunks; other rows stay as they are. `left` columns exist from the tile's first."""
    t = plan.tiles

    def block(b: Any, _: None) -> None:
        rows = pl.ds(pl.multiple_of(b * t.block, t.block), t.block)
        factor = None if refs.factor is None else down(refs.factor[:, rows])

        def put(ref: Any, at: tuple[Any, Any], value: Array, shape: tuple[int, int]) -> None:
            row = b * t.block + lax.broadcasted_iota(jnp.int32, shape, shape.index(t.block))
            ref[at] = jnp.where((row >= low) & (row < high), value.astype(ref.dtype), ref[at])

        def chunk(c: Any, total: Array | None) -> Array | None:
            columns = pl.ds(pl.multiple_of(c * t.chunk, t.chunk), t.chunk)
            values, term = part(Chunk(refs, rows, columns, plan.transposed, factor))
            for ref, value in zip(outs, values, strict=False):
                put(ref, (rows, columns), value, (t.block, 1))
            if total is None or term is None:
                return None
            inside = c * t.chunk + lax.broadcasted_iota(jnp.int32, (1, t.chunk), 1) < left
            return total + folded(jnp.where(inside, term, 0.0))

        chunks = (jnp.minimum(left, t.columns) + t.chunk - 1) // t.chunk
        total = lax.fori_loop(0, chunks, chunk, jnp.zeros((t.block, LANES), F32) if sums else None)
        if total is not None:
            put(outs[-1], (slice(None), rows), jnp.sum(total.T, axis=0, keepdims=True), (1, t.block))

    lax.fori_loop(low // t.block, (high + t.block - 1) // t.block, block, None)


def folded(x: Array) -> Array:
    """Sums of each row's columns that are a register's width apart: [rows, LANES]."""
    return sum(x[:, i : i + LANES] for i in range(LANES, x.shape[1], LANES)) + x[:, :LANES]


def down(row: Array) -> Array:
    """[1, n] turned to [n, 1], by way of a square that the transpose unit takes."""
    return jnp.broadcast_to(row, (LANES, row.shape[1])).T[:, :1]
