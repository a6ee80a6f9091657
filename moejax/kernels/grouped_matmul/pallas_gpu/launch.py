"""One block on every multiprocessor: the third of its warpgroups fetches, the other two multiply."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from moejax import compat
from moejax.kernels.chips import ChipSpec
from moejax.kernels.grouped_matmul.pallas_gpu import ring
from moejax.kernels.grouped_matmul.pallas_gpu.tiles import CONSUMERS, DEPTH, SWIZZLE

BLOCKS, WARPGROUPS = "blocks", "warpgroups"
PRODUCER_REGISTERS, CONSUMER_REGISTERS = 40, 232
"""Of a thread; 65,536 in all."""


def staged(stages: int, rows: int, columns: int, dtype: Any) -> Any:
    """A ring's slots of [rows, columns] as wgmma reads them, from either major."""
    layout = plgpu.TilingTransform((8, DEPTH)), plgpu.SwizzleTransform(SWIZZLE)
    return plgpu.SMEM((stages, rows, columns), dtype, transforms=layout)


def run(
    body: Callable[..., None],
    operands: tuple[jax.Array, ...],
    out: Any,
    scratch: dict[str, Any],
    chip: ChipSpec,
    name: str,
    interpret: Any,
) -> Any:
    """body(*operands, *out, **scratch), as refs, in every warpgroup of every block."""
    like = [compat.shaped_like(operands[0], o.shape, o.dtype) for o in out]
    kernel = plgpu.kernel(
        body,
        out_type=like,
        scratch_types=scratch,
        grid=(chip.cores,),
        grid_names=(BLOCKS,),
        num_threads=CONSUMERS + 1,
        thread_name=WARPGROUPS,
        kernel_name=name,
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        interpret=interpret,
    )
    return kernel(*operands)


def roles(produce: Callable[[], None], consume: Callable[[jax.Array], None]) -> None:
    """Each warpgroup to its part, with registers to match."""
    warpgroup = lax.axis_index(WARPGROUPS)

    @pl.when(warpgroup == CONSUMERS)
    def _() -> None:
        plgpu.set_max_registers(PRODUCER_REGISTERS, action="decrease")
        produce()

    @pl.when(warpgroup < CONSUMERS)
    def _() -> None:
        plgpu.set_max_registers(CONSUMER_REGISTERS, action="increase")
        consume(warpgroup)


def each_task(count: ring.Count, body: Callable[[jax.Array, jax.Array], jax.Array]) -> jax.Array:
    """turn = body(task, turn) for this block's share of the tasks, from turn 0; returns the last turn."""
    block, blocks = lax.axis_index(BLOCKS), lax.axis_size(BLOCKS)
    mine = lax.div(count - block + blocks - 1, blocks)
    return lax.fori_loop(0, mine, lambda i, turn: body(block + i * blocks, turn), jnp.int32(0))
