"""The Hopper kernels, run by Mosaic GPU's interpreter against NumPy float64 with its race detector on.

The interpreter runs one block after the other, with the three warpgroups of a block as threads and TMA and barriers simulated;
wgmma is synchronous in it. Up to jax 0.11 it knows neither transposed operands nor transfers that end out of bounds, and takes
seconds for a call: there one layout of groups is run, and what it cannot run is only lowered (test_pallas_gpu_programs).
"""

import dataclasses
import functools

import harness
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax import compat
from moejax.kernels import activations
from moejax.kernels.activations import Activation
from moejax.kernels.chips import CHIPS
from moejax.kernels.grouped_matmul import pallas_gpu
from moejax.kernels.grouped_matmul.pallas_gpu import Tiles, tasks, tiles

pytestmark = pytest.mark.usefixtures("strict_dtypes")

H200 = CHIPS["h200"]
WHOLE = jax.__version_info__ >= (0, 12)
later = pytest.mark.skipif(
    not WHOLE, reason="the interpreter of this jax knows no transposed operand and no ragged edge"
)
SMALL = dataclasses.replace(H200, cores=2)
NARROW = Tiles(columns=128, stages=2, panel=2)

M, START = 336, 7
K, N = 192, 192 if WHOLE else 256  # half a tile of columns, where the interpreter knows how it ends
SIZES = {
    1: {"all": [M - START], "part": [200], "none": [0]},
    3: {"tiles": [128, 1, 128], "empty first": [0, 130, 40], "none": [0, 0, 0], "all": [129, 1, M - START - 130]},
    8: {
        "mixed": [5, 0, 127, 0, 1, 128, 20, 3],
        "one hot": [0, 0, 0, M - START, 0, 0, 0, 0],
        "last only": [0, 0, 0, 0, 0, 0, 0, 9],
        "even": [(M - START) // 8] * 8,
    },
    128: {"sparse": [11 * (g % 9 == 1) for g in range(128)]},
    256: {"first and last": [70] + [0] * 254 + [3]},
}
LAYOUTS = SIZES if WHOLE else {8: {"mixed": SIZES[8]["mixed"]}}
TOLERANCE = 1e-2


def spans(sizes):
    """(group, its rows as a slice)."""
    stops = START + np.cumsum(sizes, dtype=int)
    return [(g, slice(stop - size, stop)) for g, (size, stop) in enumerate(zip(sizes, stops, strict=True))]


def random(seed, *shape, dtype="bfloat16"):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def poisoned(x, sizes):
    """NaN in the rows of no group."""
    row = np.arange(M)[:, None]
    return jnp.where((row >= START) & (row < START + sum(sizes)), x, jnp.full((), jnp.nan, x.dtype))


def wide(x):
    return np.asarray(x, np.float64)


@functools.cache
def kernel(name, **options):
    """A kernel in the interpreter, jitted: every test of a shape uses one compilation."""
    function = functools.partial(
        getattr(pallas_gpu, name), chip=SMALL, tiles=NARROW, interpret=compat.gpu_interpreter(), **options
    )
    return harness.jit(function)


def run(name, operands, sizes, **options):
    """The kernel's result, without a race."""
    out = kernel(name, **options)(*operands, jnp.asarray(sizes, jnp.int32), jnp.int32(START))
    assert not compat.interpreted_races()
    return out


def check_rows(got, wanted, sizes, what):
    """Rows of the groups are right, and no other row was written."""
    live = slice(START, START + sum(sizes))
    got = wide(got)
    harness.close(got[live], wanted[live], TOLERANCE, what)
    rest = np.concatenate([got[: live.start], got[live.stop :]])
    assert np.isnan(rest).all() if WHOLE else not rest.any(), "rows outside the groups were written"


def product(xs, ws, sizes):
    y = np.zeros((M, ws[0].shape[2]))
    for x, w in zip(xs, ws, strict=True):
        for g, rows in spans(sizes):
            y[rows] += wide(x[rows]) @ wide(w[g])
    return y


@pytest.mark.parametrize("groups", LAYOUTS)
def test_forward(groups):
    """Every layout of groups, with NaN in the rows that belong to none."""
    w = random(1, groups, K, N)
    for name, sizes in LAYOUTS[groups].items():
        x = poisoned(random(0, M, K), sizes)
        y = run("matmul", ((x,), (w,)), sizes, out_dtype=jnp.bfloat16)
        check_rows(y, product([x], [w], sizes), sizes, name)


@pytest.mark.parametrize("pairs", [1, 2])
@later
def test_input_gradient(pairs):
    """Transposed weights as they lie, and the sum over the two weights of a gated layer, of which one is deeper."""
    depths = (N, 64)[:pairs]
    for name, sizes in LAYOUTS[8].items():
        xs = tuple(poisoned(random(i, M, depth), sizes) for i, depth in enumerate(depths))
        ws = tuple(random(2 + i, 8, K, depth) for i, depth in enumerate(depths))
        dx = run("matmul", (xs, ws), sizes, transpose_w=True, out_dtype=jnp.bfloat16)
        check_rows(dx, product(xs, [w.swapaxes(1, 2) for w in ws], sizes), sizes, name)


@later
def test_bias_and_wide_result():
    """A bias for every group, and a result that is not rounded: as near as fp32 sums are."""
    sizes = SIZES[8]["mixed"]
    x, w, bias = poisoned(random(0, M, K), sizes), random(1, 8, K, N), random(2, 8, N)
    wanted = product([x], [w], sizes)
    y = run("matmul", ((x,), (w,)), sizes, out_dtype=jnp.float32)
    live = slice(START, START + sum(sizes))
    harness.close(wide(y)[live], wanted[live], 1e-5, "fp32")
    for g, rows in spans(sizes):
        wanted[rows] += wide(bias[g])
    with_bias = functools.partial(
        pallas_gpu.matmul, out_dtype=jnp.bfloat16, chip=SMALL, interpret=compat.gpu_interpreter()
    )
    y = with_bias((x,), (w,), jnp.asarray(sizes, jnp.int32), jnp.int32(START), bias=bias)
    check_rows(y, wanted, sizes, "bias")


@pytest.mark.parametrize("groups", [1, 3, 8, 128])
@later
def test_weight_gradient(groups):
    """NaN before and behind the groups; an empty group's gradient is exactly zero."""
    height, width = (K, N) if groups < 128 else (64, 64)
    for name, sizes in SIZES[groups].items():
        x, dy = (poisoned(random(i, M, columns), sizes) for i, columns in enumerate((height, width)))
        dw = wide(run("weight_gradient", (x, dy), sizes, out_dtype=jnp.bfloat16))
        for g, rows in spans(sizes):
            harness.close(dw[g], wide(x[rows]).T @ wide(dy[rows]), TOLERANCE, name)
            assert sizes[g] or not dw[g].any()


@pytest.mark.parametrize("kind", activations.KINDS if WHOLE else ["swiglu"])
def test_glu(kind):
    """Every activation, with and without biases: h rounded, and exactly the activation of the rounded h."""
    activation = Activation(kind, 0.5 if kind == "gpt_oss" else None)
    sizes, parts = SIZES[8]["mixed"], 1 + activation.gated
    x, ws = poisoned(random(0, M, K), sizes), tuple(random(1 + i, 8, K, N) for i in range(parts))
    biases = tuple(random(3 + i, 8, N) for i in range(parts)) if kind == "gpt_oss" else ()
    names = ("gate_bias", "up_bias")[-parts:]

    @harness.jit
    def both(x, ws, biases, sizes):
        return pallas_gpu.glu(
            x, ws[0] if activation.gated else None, ws[-1], sizes, jnp.int32(START), activation=activation, chip=SMALL,
            tiles=NARROW, interpret=compat.gpu_interpreter(), **dict(zip(names, biases, strict=False)),
        )  # fmt: skip

    a, gate, up = both(x, ws, biases, jnp.asarray(sizes, jnp.int32))
    assert not compat.interpreted_races()
    assert (gate is not None) == activation.gated
    for i, h in enumerate((gate, up)[-parts:]):
        wanted = product([x], [ws[i]], sizes)
        if biases:
            for g, rows in spans(sizes):
                wanted[rows] += wide(biases[i][g])
        check_rows(h, wanted, sizes, f"h{i}")
    live = slice(START, START + sum(sizes))
    wanted = activation.value(None if gate is None else gate[live], up[live]).astype(jnp.bfloat16)
    harness.close(wide(a)[live], wide(wanted), 8e-3, kind)  # a last bit of bf16: the interpreter's exp is another


@later
def test_same_bits_twice():
    sizes = SIZES[8]["mixed"]
    x, dy, w = random(0, M, K), random(1, M, N), random(2, 8, K, N)
    live = slice(START, START + sum(sizes))
    for name, operands in (("matmul", ((x,), (w,))), ("weight_gradient", (x, dy))):
        one, two = (wide(run(name, operands, sizes, out_dtype=jnp.bfloat16)) for _ in range(2))
        rows = live if name == "matmul" else slice(None)
        np.testing.assert_array_equal(one[rows], two[rows])


@pytest.mark.parametrize("panel", [1, 3, 8])
def test_tasks_cover_every_row_and_column_once(panel):
    """The work list alone, at real sizes: no row of a group is missing or stored twice, and no tile has no rows."""
    rng, columns, tile_columns = np.random.default_rng(0), 1000, 256
    for _ in range(10):
        sizes = (rng.dirichlet(np.full(7, 0.3)) * 3000 * (rng.random(7) < 0.8)).astype(np.int32)
        work = tasks.of_rows(jnp.asarray(sizes), jnp.int32(START), 3100, columns, tile_columns, panel)
        table, count = tasks.Task(*np.asarray(work.table)), int(work.total[0])
        assert count <= len(table.row)
        stored = np.zeros((3100, -(-columns // tile_columns)), int)
        ends = START + np.cumsum(sizes)
        for at in map(tasks.Task._make, zip(*(field[:count] for field in table), strict=True)):
            assert at.row % tiles.ALIGNED == 0 and at.row <= at.first < at.stop <= at.row + tiles.ROWS
            assert ends[at.group] - sizes[at.group] <= at.first and at.stop <= ends[at.group]
            stored[at.first : at.stop, at.column // tile_columns] += 1
        assert (stored[START : ends[-1]] == 1).all() and stored.sum() == stored.shape[1] * sizes.sum()
