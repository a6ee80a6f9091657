"""The grouped matmul and its weight gradient for TPU, interpreted on CPU, against NumPy float64. Nothing here runs on a TPU."""

import harness
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contracts.on_tpu import (
    ONE,
    SIZES,
    TOLERANCE,
    TWO,
    K,
    M,
    N,
    close_rows,
    drawn,
    f64,
    gradient_of,
    i32,
    jitted,
    options,
    rows_times,
    twice,
)

from moejax.kernels.grouped_matmul import pallas_tpu

pytestmark = pytest.mark.usefixtures("strict_dtypes")


@pytest.mark.parametrize(("groups", "chip"), [(1, ONE), (3, ONE), (8, ONE)])
def test_matmul_and_both_gradients(groups, chip):
    """y, dx by weights transposed in the core, dw; a group without rows has a gradient of exactly zero."""
    x, w, dy = drawn("float32", (M, K), (groups, K, N), (M, N))
    forward, backward = (jitted("matmul", chip, out_dtype=jnp.float32, transpose_w=t) for t in (False, True))
    gradient = jitted("weight_gradient", chip, out_dtype=jnp.float32)
    for sizes in SIZES[groups].values():
        y = forward((x,), (w,), i32(sizes), i32(0))
        close_rows(y, rows_times(x, w, sizes), sizes)
        close_rows(backward((dy,), (w,), i32(sizes), i32(0)), rows_times(dy, f64(w).swapaxes(1, 2), sizes), sizes)
        dw = gradient(x, dy, i32(sizes), i32(0))
        harness.close(dw, gradient_of(x, dy, sizes))
        assert not np.any(np.asarray(dw)[np.asarray(sizes) == 0])


@pytest.mark.parametrize("layout", ["mixed", "one hot"])
def test_two_cores(layout):
    """Rows are shared between the cores, tiles of the gradient too; no race is found."""
    x, w, dy = drawn("float32", (M, K), (8, K, N), (M, N))
    sizes = SIZES[8][layout]
    y = jitted("matmul", TWO, out_dtype=jnp.float32)((x,), (w,), i32(sizes), i32(0))
    close_rows(y, rows_times(x, w, sizes), sizes)
    dw = jitted("weight_gradient", TWO, out_dtype=jnp.float32)(x, dy, i32(sizes), i32(0))
    harness.close(dw, gradient_of(x, dy, sizes))


def test_bfloat16_bit_equal_twice():
    x, w, dy = drawn("bfloat16", (M, K), (8, K, N), (M, N))
    sizes = SIZES[8]["mixed"]
    y = twice(jitted("matmul", out_dtype=jnp.bfloat16), (x,), (w,), i32(sizes), i32(0))
    close_rows(y, rows_times(x, w, sizes), sizes, "bfloat16")
    dw = twice(jitted("weight_gradient", out_dtype=jnp.bfloat16), x, dy, i32(sizes), i32(0))
    harness.close(dw, gradient_of(x, dy, sizes), TOLERANCE["bfloat16"])


@pytest.mark.parametrize("transpose", [False, True])
def test_two_pairs_and_a_bias(transpose):
    """The input gradient of a gated layer in one pass."""
    x, v, w, u, bias = drawn("float32", (M, K), (M, K), (3, K, N), (3, K, N), (3, N))
    sizes = SIZES[3]["all"]
    ws = (w.swapaxes(1, 2), u.swapaxes(1, 2)) if transpose else (w, u)
    y = jitted("matmul", out_dtype=jnp.float32, transpose_w=transpose)((x, v), ws, i32(sizes), i32(0), bias=bias)
    wanted = rows_times(x, w, sizes) + rows_times(v, u, sizes) + np.repeat(f64(bias), sizes, axis=0)
    close_rows(y, wanted, sizes)


@pytest.mark.parametrize("start", [0, 37])
def test_b14_rows_of_no_group_may_hold_anything(start):
    """Before `start` and after the last group: NaN there changes no bit of anything that is read."""
    sizes = [50, 0, 23]
    x, w, dy = drawn("float32", (M, K), (3, K, N), (M, N))
    nobody = np.ones((M, 1), bool)
    nobody[start : start + sum(sizes)] = False
    forward, gradient = (jitted(name, out_dtype=jnp.float32) for name in ("matmul", "weight_gradient"))
    y, dw = forward((x,), (w,), i32(sizes), i32(start)), gradient(x, dy, i32(sizes), i32(start))
    close_rows(y, rows_times(x, w, sizes, start), sizes, start=start)
    harness.close(dw, gradient_of(x, dy, sizes, start))
    bad_x, bad_dy = (jnp.where(nobody, jnp.float32(jnp.nan), a) for a in (x, dy))
    bad_y = forward((bad_x,), (w,), i32(sizes), i32(start))
    np.testing.assert_array_equal(np.asarray(bad_y)[~nobody[:, 0]], np.asarray(y)[~nobody[:, 0]])
    np.testing.assert_array_equal(gradient(bad_x, bad_dy, i32(sizes), i32(start)), dw)


def test_gradient_added_to_what_is_there():
    x, dy, into = drawn("float32", (M, K), (M, N), (3, K, N))
    sizes = [40, 0, 70]
    dw = jitted("weight_gradient", out_dtype=jnp.float32)(x, dy, i32(sizes), i32(0), accumulate_into=into)
    harness.close(dw, gradient_of(x, dy, sizes) + f64(into))
    np.testing.assert_array_equal(dw[1], into[1])


@pytest.mark.parametrize("groups", [128, 256])
def test_many_groups(groups):
    """Several groups in a tile of rows, half of them empty."""
    rng = np.random.default_rng(groups)
    sizes = rng.multinomial(M, np.full(groups, 1 / groups)) * (rng.random(groups) < 0.5)
    x, w, dy = drawn("float32", (M, K), (groups, K, 9), (M, 9))
    y = jitted("matmul", out_dtype=jnp.float32)((x,), (w,), i32(sizes), i32(0))
    close_rows(y, rows_times(x, w, sizes), sizes)
    if groups == 128:
        gradient = jitted("weight_gradient", out_dtype=jnp.float32)
        harness.close(gradient(x, dy, i32(sizes), i32(0)), gradient_of(x, dy, sizes))


def test_no_rows():
    x, w, dy, into = drawn("float32", (0, K), (3, K, N), (0, N), (3, K, N))
    none = i32([0, 0, 0]), i32(0)
    assert jitted("matmul", out_dtype=jnp.float32)((x,), (w,), *none).shape == (0, N)
    gradient = jitted("weight_gradient", out_dtype=jnp.float32)
    assert not np.any(gradient(x, dy, *none))
    np.testing.assert_array_equal(gradient(x, dy, *none, accumulate_into=into), into)


# ---- inside shard_map ---------------------------------------------------------------------------------------------


def test_on_two_devices(mesh_of):
    """Rows, sizes and weights of two devices; `start` is the same everywhere. The interpreter cannot run under check_vma, which it
    loses in a kernel's index maps: tests/aot compiles for it."""
    mesh = mesh_of(expert=2)
    x, w, dy = drawn("float32", (2 * 64, K), (4, K, 9), (2 * 64, 9))
    sizes = np.random.default_rng(3).integers(0, 33, 4)
    axis = mesh.axis_names[int(np.argmax(mesh.devices.shape))]
    spec, whole = jax.sharding.PartitionSpec(axis), jax.sharding.PartitionSpec()

    def both(x, w, dy, sizes, start):
        y = pallas_tpu.matmul((x,), (w,), sizes, start, out_dtype=jnp.float32, **options(ONE))
        return y, pallas_tpu.weight_gradient(x, dy, sizes, start, out_dtype=jnp.float32, **options(ONE))

    run = harness.jit(
        jax.shard_map(both, mesh=mesh, in_specs=(spec,) * 4 + (whole,), out_specs=(spec, spec), check_vma=False)
    )
    put = [jax.device_put(a, jax.NamedSharding(mesh, spec)) for a in (x, w, dy, i32(sizes))]
    with jax.set_mesh(mesh):
        y, dw = run(*put, jax.device_put(i32(0), jax.NamedSharding(mesh, whole)))
    for d in range(2):
        mine, rows, groups = sizes[2 * d : 2 * d + 2], slice(64 * d, 64 * d + 64), slice(2 * d, 2 * d + 2)
        close_rows(np.asarray(y)[rows], rows_times(x[rows], w[groups], mine), mine)
        harness.close(np.asarray(dw)[groups], gradient_of(x[rows], dy[rows], mine))
