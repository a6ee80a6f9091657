"""The TPU kernels' work list and the rule of their tiles: plain integers."""

import functools

import harness
import numpy as np
import pytest
from contracts.on_tpu import (
    SIZES,
    TWO,
    M,
    i32,
)

from moejax.errors import ConfigError
from moejax.kernels.chips import CHIPS
from moejax.kernels.grouped_matmul import tiling
from moejax.kernels.grouped_matmul.pallas_tpu import work

pytestmark = pytest.mark.usefixtures("strict_dtypes")


# ---- the work list and the tiles ----------------------------------------------------------------------------------


@functools.cache
def listed(rows, tile, cores, share, empty):
    return harness.jit(functools.partial(work.make, rows=rows, tile=tile, cores=cores, share_rows=share, empty=empty))


@pytest.mark.parametrize("sizes", [s for table in SIZES.values() for s in table.values()], ids=str)
def test_work_list(sizes):
    """Every row of every group is in one item of one core, cores share no tile, and neither has much more than half."""
    items = listed(M, 16, 2, True, False)(i32(sizes), i32(0))
    owner = np.full(M, -1)
    tiles = []
    for core in range(2):
        span = np.arange(items.first[core], items.first[core] + items.number[core])
        tiles.append(set(np.asarray(items.tile)[span].tolist()))
        for item in span:
            group, top = int(items.group[items.run[item]]), int(items.tile[item]) * 16
            low, high = max(int(items.bounds[group]), top), min(int(items.bounds[group + 1]), top + 16)
            assert low < high and (owner[low:high] == -1).all()
            owner[low:high] = group
    wanted = np.repeat(np.arange(len(sizes)), sizes)
    np.testing.assert_array_equal(owner, np.pad(wanted, (0, M - len(wanted)), constant_values=-1))
    assert not tiles[0] & tiles[1]
    if len(tiles[0] | tiles[1]) > 1:
        assert abs(int(items.number[0] - items.number[1])) <= len(sizes)
    else:
        idle = int(items.first[1])
        assert int(items.tile[idle]) not in tiles[0]


def test_work_list_with_empty_groups():
    """The weight gradient takes every group, and a group's items follow one another."""
    sizes = SIZES[8]["mixed"]
    items = listed(M, 32, 1, False, True)(i32(sizes), i32(0))
    taken = np.asarray(items.group)[np.asarray(items.run)[: int(items.number[0])]]
    assert sorted(set(taken.tolist())) == list(range(8))
    assert (np.diff(taken) >= 0).all()


def test_a_size_that_no_tile_fits():
    demand = tiling.Demand(
        100, 2, 128, row_bytes=2**20, column_bytes=2**20, cell_bytes=2, row_align=16, contracted=2**19
    )
    with pytest.raises(ConfigError, match="of a core's memory"):
        tiling.for_rows(demand, TWO)


def test_tiles_of_any_shape_fit():
    """Whatever the shape, the rule's tiles are whole blocks and chunks and lie within the core's memory."""
    rng = np.random.default_rng(0)
    for _ in range(60):
        rows, groups = int(rng.integers(1, 10**5)), int(rng.choice([1, 3, 128, 256]))
        k, n = (int(v) for v in rng.integers(1, 15_000, 2))
        chip = [CHIPS[name] for name in ("v5e", "v5p", "v6e", "tpu7x")][int(rng.integers(4))]
        demand = tiling.Demand(rows, groups, n, 2 * k, 2 * k, 2, 16, k)
        tiles = tiling.for_rows(demand, chip)
        assert tiles.rows % tiles.block == 0 and tiles.columns % tiles.chunk == 0
        assert tiling.held(tiles, demand) <= tiling.budget(chip)
        tiles = tiling.for_gradient(rows, k, n, groups, 2, 2, chip)
        assert tiles.rows % tiles.block == 0 and tiles.columns % tiles.chunk == 0
