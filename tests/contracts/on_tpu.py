"""What the batteries of the TPU kernels share: the interpreter, small tiles, layouts of groups, and NumPy float64.

The interpreter finds races and reads of unwritten memory. Tiles are made small, so that a hundred rows are many tiles, several passes
and both cores.
"""

import functools

import harness
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import tpu as pltpu

from moejax.kernels.chips import CHIPS
from moejax.kernels.grouped_matmul import pallas_tpu
from moejax.kernels.grouped_matmul.tiling import Tiles

M, K, N = 133, 7, 200
"""Many tiles of rows; N is one whole tile of columns and a part of one."""
SIZES = {
    1: {"all": [M], "part": [100], "none": [0]},
    3: {"tiles": [64, 1, 64], "last only": [0, 0, 111], "none": [0, 0, 0], "all": [65, 1, M - 66]},
    8: {
        "mixed": [5, 0, 47, 0, 1, 48, 20, 3],
        "one hot": [0, 0, 0, M, 0, 0, 0, 0],
        "few": [0, 0, 2, 0, 4, 0, 0, 3],
        "none": [0] * 8,
    },
}
TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}
ONE, TWO = CHIPS["v6e"], CHIPS["v5p"]
"""A chip of one core and a chip of two."""
SMALL = Tiles(rows=16, block=8, columns=128, chunk=128, slots=3, depth=128)
SQUARE = Tiles(rows=128, block=128, columns=128, chunk=128)
"""The least that a kernel with factors or sums of rows takes."""


def options(chip, tiles=SMALL):
    interpret = pltpu.InterpretParams(
        detect_races=True, uninitialized_memory="nan", out_of_bounds_reads="raise", num_cores_or_threads=chip.cores
    )
    return {"chip": chip, "tiles": tiles, "interpret": interpret}


@functools.cache
def jitted(name, chip=ONE, tiles=SMALL, **settings):
    """A kernel as a function of its arrays, compiled once for each of their shapes."""
    return harness.jit(functools.partial(getattr(pallas_tpu, name), **options(chip, tiles), **settings))


def spans(sizes, start=0):
    """(group, its rows as a slice)."""
    stops = start + np.cumsum(sizes)
    return [(g, slice(stop - size, stop)) for g, (size, stop) in enumerate(zip(sizes, stops, strict=True))]


def drawn(dtype, *shapes, seed=0):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


def i32(a):
    return jnp.asarray(a, jnp.int32)


def f64(a):
    return np.asarray(a, np.float64)


def rows_times(x, w, sizes, start=0):
    """Rows of groups times their weights; other rows are NaN."""
    x, w = f64(x), f64(w)
    y = np.full((len(x), w.shape[2]), np.nan)
    for g, rows in spans(sizes, start):
        y[rows] = x[rows] @ w[g]
    return y


def gradient_of(x, dy, sizes, start=0):
    x, dy = f64(x), f64(dy)
    return np.stack([x[rows].T @ dy[rows] for _, rows in spans(sizes, start)])


def close_rows(got, wanted, sizes, dtype="float32", start=0):
    """Equal where groups have rows; the rest is nobody's."""
    live = slice(start, start + sum(sizes))
    harness.close(f64(got)[live], wanted[live], TOLERANCE[dtype])


def twice(function, *args):
    """What a call gives, after a second one gave the same bits."""
    first, second = function(*args), function(*args)
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))
    return first
