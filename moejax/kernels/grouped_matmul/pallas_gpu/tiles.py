"""What the kernels take, and how large their tiles are."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array

from moejax.errors import ConfigError
from moejax.kernels import tuned
from moejax.kernels.chips import ChipSpec
from moejax.kernels.tuned import Problem

WARPGROUP_ROWS = 64
"""Rows of one wgmma."""
CONSUMERS = 2
ROWS = WARPGROUP_ROWS * CONSUMERS
"""Rows of a tile: each consumer has a half, and both read all columns."""
SWIZZLE = 128
"""Bytes of a row of shared memory: the widest swizzle, and a step of the contraction."""
DEPTH = SWIZZLE // 2
"""Contraction of one step, in bf16."""
ALIGNED = 8
"""A transfer of rows begins at a multiple of this: rows of one tile in shared memory."""
SLOTS = 2
"""Pieces of a result that a consumer has on their way to memory."""
BARRIERS = 1024
"""Bytes of shared memory that barriers may take."""
BIAS = 1024
"""Bytes of a consumer's biases: one for each column of the widest tile."""


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Tile of one block: ROWS x columns of the result, DEPTH x stages of the contraction in flight."""

    columns: int = 256
    """All the columns that one step multiplies; a gated layer has half of them from each of its weights."""
    stages: int = 4
    panel: int = 8
    """Tiles side by side that are done before the next rows: their weights stay in L2 while the rows pass."""

    @property
    def bytes(self) -> int:
        """Shared memory of a block."""
        stage = (ROWS + self.columns) * SWIZZLE
        return self.stages * stage + CONSUMERS * (SLOTS * WARPGROUP_ROWS * SWIZZLE + BIAS) + BARRIERS


def supports(*operands: Array | jax.ShapeDtypeStruct) -> bool:
    """Whether the kernels take these rows [M, K] and weights [G, K, N]: bf16, K and N multiples of 64, M of 8.

    wgmma reads shared memory in tiles of 8 x 64, and TMA fills such tiles only from arrays that are cut into them without a rest.
    Groups may begin and end at any row. The rest goes to another backend.
    """
    rules = {2: (ALIGNED, DEPTH), 3: (1, DEPTH, DEPTH)}
    return all(
        a.dtype == jnp.bfloat16 and not any(d % rule for d, rule in zip(a.shape, rules[a.ndim], strict=True))
        for a in operands
    )


def require(*operands: Array) -> None:
    """A ConfigError for operands that `supports` refuses: a caller asks first."""
    for a in operands:
        if not supports(a):
            raise ConfigError(
                f"the Hopper kernels do not take {a.dtype}{list(a.shape)}: bf16 rows [M, K] and weights [G, K, N] with M a multiple "
                f"of {ALIGNED} and K and N of {DEPTH}; take model.moe.kernel=xla"
            )


def choose(asked: Problem, chip: ChipSpec, tiles: Tiles | None, parts: int = 1) -> Tiles:
    """The caller's, the measured or the rule's, if the kernels can have them.

    Args:
      parts: weights that share a tile, two in a gated layer.
    """
    tiles = tuned.choose(asked, tiles, Tiles, lambda: rule(asked.columns, parts))
    check(tiles, chip, parts)
    return tiles


def rule(width: int, parts: int) -> Tiles:
    """The widest tile that pads `width` columns by at most a sixteenth, else the one that pads least."""
    widths = [part * parts for part in (256, 192, 128, 64) if part * parts <= 256]
    padded = {columns: -(-width // (columns // parts)) * (columns // parts) for columns in widths}
    fine = [columns for columns in widths if 16 * padded[columns] <= 17 * width]
    return Tiles(fine[0] if fine else min(widths, key=lambda columns: padded[columns]))


def neighbours(tiles: Tiles) -> list[Tiles]:
    """One size changed by a step; `check` and the compiler say which of them can be had."""
    step = {
        "columns": (-DEPTH, DEPTH, -2 * DEPTH, 2 * DEPTH),
        "stages": (-1, 1),
        "panel": (-tiles.panel // 2, tiles.panel),
    }
    return [dataclasses.replace(tiles, **{f: getattr(tiles, f) + by}) for f, steps in step.items() for by in steps]


def check(tiles: Tiles, chip: ChipSpec, parts: int) -> None:
    """A ConfigError for tiles that the kernels cannot have."""
    part = tiles.columns // parts
    if (
        tiles.columns % parts
        or part % DEPTH
        or not DEPTH <= tiles.columns <= 256
        or tiles.stages < 2
        or tiles.panel < 1
    ):
        raise ConfigError(
            f"{tiles} with {parts} weights: columns of each weight are a multiple of {DEPTH}, at most 256 in all, and stages "
            "at least 2, a panel at least 1; leave tiles out for the static rule"
        )
    if tiles.bytes > chip.memory:
        raise ConfigError(
            f"{tiles} takes {tiles.bytes} bytes of shared memory and a multiprocessor of {chip.name} has {chip.memory}: "
            "take fewer columns or stages, or model.moe.kernel=xla"
        )


def piece(dtype: DTypeLike) -> int:
    """Columns of the result that leave together: one swizzled row."""
    return SWIZZLE // jnp.dtype(dtype).itemsize
