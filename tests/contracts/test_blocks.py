"""Blocks of rows that the portable backend works through: they cover every group, in order, with few empty rows."""

import itertools

import harness
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.kernels.grouped_matmul import Groups, blocks, grouped_matmul


@pytest.mark.parametrize("sizes", [blocks.LADDER, blocks.LADDER[1:3], blocks.LADDER[-1:]])
def test_blocks_cover_a_group(sizes):
    """One behind the other from its first row to its last, with at most the announced rows over; none empty; as many of a size as fit."""
    for load in (0, 1, 31, 32, 33, 64, 65, 191, 192, 193, 447, 448, 449, 512, 513, 1024, 1500):
        start = 7
        work = blocks.Blocks(*(jnp.asarray(v) for v in ([0], 1, [start], [start + load])), sizes)
        row, stop = start, start + load
        for size, first, turns in work.series(jnp.int32(0)):
            assert row == first
            assert turns >= max(0, stop - row) // size
            assert not turns or first + (int(turns) - 1) * size < stop
            row += size * int(turns)
        assert 0 <= row - stop <= work.over


def test_a_nearly_full_block_is_one_block():
    """Not several smaller ones, each of which would turn the weight again."""
    work = blocks.Blocks(*(jnp.asarray(v) for v in ([0], 1, [0], [450])), blocks.LADDER)
    assert [int(turns) for _, _, turns in work.series(jnp.int32(0))] == [1, 0, 0, 0]


@pytest.mark.parametrize(
    ("rows", "groups", "sizes"),
    [(0, 1, (32,)), (8, 4, (32,)), (4096, 64, (128, 32)), (4096, 16, blocks.LADDER), (10**6, 8, blocks.LADDER)],
)
def test_block_sizes(rows, groups, sizes):
    """Those of the ladder up to twice the mean rows of a group."""
    assert blocks.block_sizes(rows, groups) == sizes


def test_blocks_fit_into_the_buffer():
    """A slice of fixed size must lie inside, even where it would never be used."""
    for rows in (0, 1, 31, 200, 256, 400, 448):
        assert all(size <= rows + blocks.SPARE for size in blocks.block_sizes(rows, 1))


def test_blocks_past_the_int32_middle():
    """B19: block arithmetic on groups near 2^31 rows equals int64 NumPy."""
    sizes = [2**31 - 2000, 0, 300, 1000]
    work = blocks.cut(Groups(jnp.asarray(sizes, jnp.int32)), sum(sizes))
    np.testing.assert_array_equal(work.stops, np.cumsum(sizes))
    np.testing.assert_array_equal(work.active[: int(work.number)], [0, 2, 3])
    for group in (0, 2, 3):
        row, stop = sum(sizes[:group]), sum(sizes[: group + 1])
        for size, first, turns in work.series(jnp.int32(group)):
            assert row == first
            assert turns >= (stop - row) // size
            row += size * int(turns)
            block = blocks.Block(jnp.int32(row - size), work.stops[group], size)
            mine = row - size + np.arange(size, dtype=np.int64) < stop
            np.testing.assert_array_equal(block.mine[:, 0], mine)
        assert 0 <= row - stop <= work.over


@pytest.mark.parametrize("sizes", [(600, 301, 0, 150), (1, 255, 128, 700), (480, 66, 32, 449)])
def test_groups_of_blocks(sizes):
    """B13: groups of whole large blocks, of small ones only, and of blocks that run over: values and gradients."""
    assert blocks.block_sizes(sum(sizes), 4) == blocks.LADDER
    r = np.random.default_rng(0)
    x, w, dy = (jnp.float32(r.normal(size=shape)) for shape in ((sum(sizes), 3), (4, 3, 5), (sum(sizes), 5)))
    groups = jnp.asarray(sizes, jnp.int32)
    y, back = jax.vjp(lambda x, w: grouped_matmul(x, w, groups, impl="blocked"), x, w)
    dx, dw = back(dy)
    parts = np.cumsum((0, *sizes))
    for g, (begin, end) in enumerate(itertools.pairwise(parts)):
        own = slice(begin, end)
        harness.close(y[own], np.float64(x[own]) @ w[g], what="y")
        harness.close(dx[own], np.float64(dy[own]) @ w[g].T, what="dx")
        harness.close(dw[g], np.float64(x[own]).T @ dy[own], what="dw")
