"""How much of a grouped matmul lies in a core's memory at a time: a static rule by chip and rows per group.

A tile of rows holds K whole. It is computed in sub-blocks of `block` rows, as many as its group needs, and `chunk` columns at a time: the
inner loops stay rolled, so that a kernel's code is small whatever its shape. The weights of a group stay while its tiles of rows pass,
and those of the groups to come are on their way.
"""

from __future__ import annotations

import dataclasses

from moejax.errors import ConfigError
from moejax.kernels.chips import ChipSpec
from moejax.sharding import LANES

SHARE = 0.9
"""Of a core's memory for the tiles; the rest is the compiler's."""
UNROLLED = 2**21
"""Numbers of a weight gradient that one product makes: more fill the matrix unit better, and are more code."""


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Of a kernel over rows; `depth` is of the weight gradient alone."""

    rows: int
    block: int
    """Rows of one product; divides `rows`."""
    columns: int
    chunk: int
    """Columns of one product; divides `columns`."""
    slots: int = 2
    """Groups whose weights are in memory at a time."""
    depth: int = 0
    """Columns of x in a tile of the weight gradient."""


@dataclasses.dataclass(frozen=True)
class Demand:
    """What a kernel over rows keeps in memory, by kind, in bytes for one row or column."""

    rows: int
    groups: int
    columns: int
    row_bytes: int
    """Of the operands whose rows are whole."""
    column_bytes: int
    """Of one column of a group's weights."""
    cell_bytes: int
    """Of operands and outputs of [rows, columns]."""
    row_align: int
    """Least rows of a block."""
    contracted: int
    """Numbers of x that make one number of a chunk."""


def neighbours(tiles: Tiles) -> list[Tiles]:
    """One size halved or doubled, another number of slots; those that divide. The compiler says which of them fit."""
    sizes = [f for f in ("rows", "columns", "chunk", "depth") if getattr(tiles, f)]
    changed = [(f, getattr(tiles, f) * twice // 2) for f in sizes for twice in (1, 4)]
    found = [dataclasses.replace(tiles, **{f: value}) for f, value in (*changed, ("slots", 5 - tiles.slots))]
    return [t for t in found if _whole(t)]


def _whole(t: Tiles) -> bool:
    return (
        t.rows % t.block == 0 and t.columns % t.chunk == 0 and not any(v % LANES for v in (t.columns, t.chunk, t.depth))
    )


def ceil_to(value: int, step: int) -> int:
    return -(-value // step) * step


def floor_power(value: int) -> int:
    return 1 << max(value, 1).bit_length() - 1


def budget(chip: ChipSpec) -> int:
    return int(chip.memory * SHARE)


def held(tiles: Tiles, demand: Demand) -> int:
    """Bytes of a core's memory: what is piped is there twice, and a product's accumulator and operands once more."""
    piped = 2 * tiles.rows * (demand.row_bytes + tiles.columns * demand.cell_bytes)
    weights = tiles.slots * tiles.columns * demand.column_bytes
    product = 4 * tiles.block * tiles.chunk * 4 + tiles.chunk * demand.column_bytes
    return piped + weights + product


def for_rows(demand: Demand, chip: ChipSpec) -> Tiles:
    """The fewest passes over the rows that fit: of x, all but the first are read for nothing."""
    block = block_of(demand, chip)
    rows = min(block * max(1, 2 * chip.matrix_unit // block), ceil_to(demand.rows, block))
    chunk = chunk_of(demand, chip)
    for tall, wide in ((rows, chunk), (block, chunk), (block, LANES)):
        chunks = -(-demand.columns // wide)
        for passes in range(1, chunks + 1):
            for slots in (3, 2):
                tiles = Tiles(tall, block, -(-chunks // passes) * wide, wide, slots)
                if held(tiles, demand) <= budget(chip):
                    return tiles
    least = Tiles(block, block, LANES, LANES)
    raise ConfigError(
        f"rows of {demand.row_bytes} bytes and columns of {demand.column_bytes} need {held(least, demand)} bytes of a core's memory, and "
        f"{chip.name} gives {budget(chip)}: split the contracted dimension over devices, or use kernel=xla"
    )


def block_of(demand: Demand, chip: ChipSpec) -> int:
    """About the mean rows of a group, at most the side of the matrix unit."""
    mean = floor_power(demand.rows // demand.groups)
    return max(demand.row_align, min(chip.matrix_unit, mean))


def chunk_of(demand: Demand, chip: ChipSpec) -> int:
    """A product starts and ends with the matrix unit idle: the shorter the contraction, the more columns it takes to hide that."""
    side = chip.matrix_unit
    wanted = floor_power(64 * side * LANES // max(demand.contracted, 1))
    return min(max(2 * side, min(8 * side, wanted)), ceil_to(demand.columns, LANES))


def for_gradient(rows: int, depth: int, columns: int, groups: int, element: int, out: int, chip: ChipSpec) -> Tiles:
    """Of the weight gradient [depth, columns] a tile at a time, the largest that fit: x is read again for each tile of columns, dy for
    each of depth. `element` and `out` are bytes of a number of x and of the output, or of both outputs if it is added to."""
    side = chip.matrix_unit
    block = max(32, min(side, floor_power(rows // groups)))
    tall = min(4 * side, ceil_to(rows, block))

    def parts(of: int) -> list[int]:
        return sorted({ceil_to(-(-of // n), LANES if n == 1 else side) for n in range(1, -(-of // side) + 1)})

    def chunked(d: int, part: int) -> tuple[int, int]:
        """(columns, chunk): whole chunks as wide as the code may grow, with the fewest columns that are past the end."""
        widest = max(UNROLLED // d // LANES, 1) * LANES
        pieces = -(-part // widest)
        chunks = [ceil_to(-(-part // n), LANES) for n in range(pieces, 2 * pieces)]
        return min((-(-part // chunk) * chunk, -chunk) for chunk in chunks)

    def held(d: int, c: int) -> int:
        return (
            d * c * (4 + 2 * out) + 2 * tall * (d + c) * element + block * d * (element + 4) + 4 * d * min(c, 2 * side)
        )

    def cost(d: int, c: int) -> tuple[int, int]:
        turns = -(-depth // d), -(-columns // c)
        idle = turns[0] * turns[1] % chip.cores
        return rows * (depth * turns[1] + columns * turns[0]) * (3 if idle else 2), d

    tiles = [(d, *chunked(d, part)) for d in parts(depth) for part in parts(columns) if d <= 2048 and part <= 4096]
    fits = [(d, c, -less) for d, c, less in tiles if held(d, c) <= budget(chip)]
    if not fits:
        raise ConfigError(
            f"a weight gradient of [{depth}, {columns}] in tiles of [{LANES}, {LANES}] does not fit {budget(chip)} bytes of a core of "
            f"{chip.name}; use kernel=xla"
        )
    d, c, chunk = min(fits, key=lambda tile: cost(*tile[:2]))
    return Tiles(tall, block, c, chunk, depth=d)
