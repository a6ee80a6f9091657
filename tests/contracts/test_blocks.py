"""Waves of blocks that the portable backend works through: they cover every row of every group once, with few empty rows."""

import itertools

import harness
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.kernels.grouped_matmul import Groups, blocks, grouped_matmul

LOADS = [
    (600, 301, 0, 150),
    (1, 255, 128, 700),
    (480, 66, 32, 449),
    (0, 0, 4000, 1),
    (577, 576, 0, 575),
    (0,) * 9,
    (7, *(0,) * 300, 5),
    (1500,),
]


def cut(sizes, start=0, rows=None):
    """The waves, and their parts that have rows as (group, row, rows, room)."""
    total = int(start + sum(sizes)) if rows is None else rows
    groups = Groups(jnp.asarray(sizes, jnp.int32), jnp.int32(start))
    work, found = blocks.cut(groups, total), []

    def visit(wave, seen):
        jax.debug.callback(lambda *w: found.append((*map(np.asarray, w), wave.size)), *wave[:3], ordered=True)
        return seen

    jax.block_until_ready(jax.jit(lambda: work.each(visit, jnp.int32(0)))())
    jax.effects_barrier()
    return work, found


@pytest.mark.parametrize("sizes", LOADS)
@pytest.mark.parametrize("start", [0, 7])
def test_waves_cover_every_row_once(sizes, start):
    """Each row in one block of its own group; no block larger than its room, in each wave the least room that holds it."""
    work, waves = cut(sizes, start)
    seen = np.full(start + sum(sizes), -1)
    for group, row, rows, size in waves:
        assert rows[0] == rows.max() > (work.sizes + (0,))[work.sizes.index(size) + 1] and rows[0] <= size
        for g, begin, number in zip(group, row, rows, strict=True):
            assert (seen[begin : begin + number] == -1).all()
            seen[begin : begin + number] = g
    np.testing.assert_array_equal(seen[start:], np.repeat(np.arange(len(sizes)), sizes))
    assert (seen[:start] == -1).all()


def test_few_rows_of_a_wave_are_empty():
    """Of many random loads: the room of all waves is at most 1.25 times their rows, whatever the skew."""
    r = np.random.default_rng(0)
    for weights in (np.ones(32), np.arange(1.0, 33.0) ** -1.2, np.r_[np.ones(4), np.full(28, 1e-3)]):
        sizes = r.multinomial(16384, weights / weights.sum())
        _, waves = cut(sizes)
        room = sum(size * len(rows) for _, _, rows, size in waves)
        assert room <= 1.25 * 16384, (room / 16384, weights[:3])


@pytest.mark.parametrize("sizes", LOADS)
def test_what_fills_a_wave_is_read_from_rows_that_are_owned(sizes):
    """Nothing past the groups is touched, which may be anything: not by empty blocks, nor by what repeats a block's last row."""
    start = 3
    _, waves = cut(sizes, start, start + sum(sizes) + 40)
    for group, row, rows, size in waves:
        places = np.asarray(blocks.Wave(*(jnp.asarray(v) for v in (group, row, rows)), size).places)
        assert places.min() >= start and places.max() < start + sum(sizes)
        mine = np.asarray(blocks.Wave(*(jnp.asarray(v) for v in (group, row, rows)), size).mine)
        np.testing.assert_array_equal(mine.sum(1), rows)


@pytest.mark.parametrize(
    ("rows", "groups", "sizes"),
    [(0, 1, (32,)), (8, 4, (32,)), (4096, 64, (96, 32)), (4608, 16, blocks.LADDER), (10**6, 8, blocks.LADDER)],
)
def test_block_sizes(rows, groups, sizes):
    """Those of the ladder up to twice the mean rows of a group."""
    assert blocks.block_sizes(rows, groups) == sizes


def test_blocks_past_the_int32_middle():
    """B19: block arithmetic on groups near 2^31 rows equals int64 NumPy."""
    sizes = [2**31 - 2000, 0, 300, 1000]
    work = jax.jit(lambda s: blocks.cut(Groups(s), sum(sizes))[:3])(jnp.asarray(sizes, jnp.int32))
    group, row, rows = (np.asarray(v, np.int64).reshape(-1) for v in work)
    order = np.argsort(row[rows > 0])
    group, row, rows = (v[rows > 0][order] for v in (group, row, rows))
    np.testing.assert_array_equal(row, np.r_[0, np.cumsum(rows)[:-1]])
    np.testing.assert_array_equal(np.bincount(group, rows, 4), sizes)
    last = blocks.Wave(*(jnp.asarray(v[-1:], jnp.int32) for v in (group, row, rows)), blocks.LADDER[0])
    np.testing.assert_array_equal(last.places[0], np.minimum(row[-1] + np.arange(blocks.LADDER[0]), sum(sizes) - 1))


@pytest.mark.parametrize("sizes", LOADS[:5])
def test_groups_of_blocks(sizes):
    """B13: groups of one block, of several and of none, in waves of every room: values and gradients."""
    r = np.random.default_rng(0)
    number = len(sizes)
    x, w, dy = (jnp.float32(r.normal(size=shape)) for shape in ((sum(sizes), 3), (number, 3, 5), (sum(sizes), 5)))
    groups = jnp.asarray(sizes, jnp.int32)
    y, back = jax.vjp(lambda x, w: grouped_matmul(x, w, groups, impl="blocked"), x, w)
    dx, dw = back(dy)
    parts = np.cumsum((0, *sizes))
    for g, (begin, end) in enumerate(itertools.pairwise(parts)):
        own = slice(begin, end)
        harness.close(y[own], np.float64(x[own]) @ w[g], what="y")
        harness.close(dx[own], np.float64(dy[own]) @ w[g].T, what="dx")
        harness.close(dw[g], np.float64(x[own]).T @ dy[own], what="dw")
