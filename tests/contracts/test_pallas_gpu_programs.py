"""The Hopper kernels as programs: lowered for cuda at every published shape, what they refuse, and their bench."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax import compat, config
from moejax.bench import gpu_kernels, timing
from moejax.bench.shapes import SHAPES, Shape
from moejax.errors import ConfigError, UserError
from moejax.kernels.activations import Activation
from moejax.kernels.chips import CHIPS
from moejax.kernels.grouped_matmul import pallas_gpu
from moejax.kernels.grouped_matmul.pallas_gpu import Tiles, tiles

pytestmark = pytest.mark.usefixtures("strict_dtypes")

H200 = CHIPS["h200"]
DEVICE = jax.sharding.AbstractDevice("NVIDIA H200", num_cores=H200.cores, platform="gpu")
TWO = jax.sharding.AbstractMesh((2,), ("fsdp",), (jax.sharding.AxisType.Explicit,), abstract_device=DEVICE)


def of(*dims, dtype=jnp.bfloat16):
    """An array whose part on each of two devices has these dimensions."""
    return jax.ShapeDtypeStruct((2 * dims[0], *dims[1:]), dtype, sharding=jax.NamedSharding(TWO, jax.P("fsdp")))


def lowered(function, *operands):
    """What is compiled for an H200, text of a program; nothing is run."""
    with jax.sharding.use_abstract_mesh(TWO):
        mapped = jax.shard_map(function, in_specs=jax.P("fsdp"), out_specs=jax.P("fsdp"), check_vma=True)
        return jax.jit(mapped).trace(*operands).lower(lowering_platforms=("cuda",)).as_text()


def supported(shape):
    return pallas_gpu.supports(of(shape.rows, shape.width), of(shape.experts, shape.width, shape.hidden))


@pytest.mark.parametrize("name", [name for name, shape in SHAPES.items() if supported(shape)])
def test_lowers_for_cuda(name):
    """Every kernel for every shape that is measured and taken, inside shard_map over two devices."""
    shape = SHAPES[name]
    rows, D, F, E = shape.rows, shape.width, shape.hidden, shape.experts

    def layer(x, gate, up, down, gate_bias, up_bias, down_bias, sizes, start, dy):
        biases = {"gate_bias": gate_bias, "up_bias": up_bias} if shape.biases else {}
        groups, common = (sizes, start[0]), {"chip": H200}
        a, h_gate, h_up = pallas_gpu.glu(x, gate, up, *groups, activation=shape.activation, **biases, **common)
        down_bias = down_bias if shape.biases else None
        y = pallas_gpu.matmul((a,), (down,), *groups, bias=down_bias, out_dtype=jnp.bfloat16, **common)
        da = pallas_gpu.matmul((dy,), (down,), *groups, transpose_w=True, out_dtype=jnp.bfloat16, **common)
        pair = (da, da), (gate, up)
        dx = pallas_gpu.matmul(*pair, *groups, transpose_w=True, out_dtype=jnp.bfloat16, **common)
        dw = pallas_gpu.weight_gradient(x, h_up, *groups, out_dtype=jnp.float32, **common)
        return y, dx, dw, pallas_gpu.weight_gradient(a, dy, *groups, out_dtype=jnp.bfloat16, **common), h_gate

    text = lowered(
        layer, of(rows, D), of(E, D, F), of(E, D, F), of(E, F, D), of(E, F), of(E, F), of(E, D),
        of(E, dtype=jnp.int32), of(1, dtype=jnp.int32), of(rows, D),
    )  # fmt: skip
    assert text.count("custom_call @mosaic_gpu") == 6


def test_every_published_shape_is_taken():
    """All but the experiment's own, whose experts are 96 wide."""
    assert [name for name, shape in SHAPES.items() if not supported(shape)] == ["tiny"]


def test_supports():
    """bf16, cut into tiles of 8 x 64 without a rest; everything else is for another backend."""
    x, w = jnp.zeros((24, 64), jnp.bfloat16), jnp.zeros((2, 64, 128), jnp.bfloat16)
    assert pallas_gpu.supports(x, w)
    for a in (x.astype(jnp.float32), x[:20], x[:, :40], w[:, :, :96], w[:, :40]):
        assert not pallas_gpu.supports(a)
    with pytest.raises(ConfigError, match="multiple of 8 and K and N of 64; take model.moe.kernel=xla"):
        pallas_gpu.matmul((x[:20],), (w,), jnp.zeros(2, jnp.int32), jnp.int32(0), out_dtype=jnp.bfloat16, chip=H200)


def test_tiles():
    """The static rule, and the error for a size that no multiprocessor has."""
    assert [tiles.rule(n, 1).columns for n in (2048, 2880, 96, 8, 136)] == [256, 192, 128, 64, 192]
    assert [tiles.rule(n, 2).columns for n in (768, 2880, 96)] == [256, 256, 256]
    for n, parts in ((2048, 1), (768, 2)):
        tiles.check(tiles.rule(n, parts), H200, parts)
    with pytest.raises(ConfigError, match="shared memory"):
        tiles.check(Tiles(stages=5), H200, 1)
    with pytest.raises(ConfigError, match="multiple of 64"):
        tiles.check(Tiles(columns=100), H200, 1)


def test_no_rows():
    sizes, start = jnp.zeros(3, jnp.int32), jnp.int32(0)
    x, w = jnp.zeros((0, 16), jnp.bfloat16), jnp.zeros((3, 16, 24), jnp.bfloat16)
    assert pallas_gpu.matmul((x,), (w,), sizes, start, out_dtype=jnp.bfloat16, chip=H200).shape == (0, 24)
    a, gate, up = pallas_gpu.glu(x, w, w, sizes, start, activation=Activation(), chip=H200)
    assert a.shape == gate.shape == up.shape == (0, 24)
    dw = pallas_gpu.weight_gradient(x, a, sizes, start, out_dtype=jnp.float32, chip=H200)
    assert dw.shape == (3, 16, 24) and not dw.any()


@pytest.mark.skipif(jax.__version_info__ < (0, 12), reason="the interpreter of this jax knows no transposed operand")
def test_bench(monkeypatch):
    """The bench's own arithmetic on a tiny shape: the kernels agree with `lax.ragged_dot`, one by one and in a layer."""
    monkeypatch.setattr(timing, "BURST", 0.0)
    shape, one, simulated = Shape(64, 64, 64, 3), dataclasses.replace(H200, cores=1), compat.gpu_interpreter()
    kinds = "input gradient", "weight gradient"
    row = gpu_kernels.case(shape, "one step", "zipf", one, 1, kinds, interpret=simulated)
    for kind in kinds:
        assert row[kind]["pallas_gpu"]["error"] < gpu_kernels.WRONG, kind
        assert row[kind]["dense"]["of_dense"] == 1
    operands = gpu_kernels.operands_of(shape, np.asarray([20, 0, 44]), 0)
    tables = gpu_kernels.implementations(shape, operands, one, simulated)
    layers = {who: table["layer"]() for who, table in tables.items()}
    assert timing.error_of(layers["pallas_gpu"], layers["ragged_dot"]) < gpu_kernels.WRONG
    assert [a.shape for a in layers["dense"][:2]] == [(64, 64)] * 2
    result = {"rounds": 1, "machine": {}, "tokamax": "not installed", "rows": [row]}
    assert "WRONG" not in gpu_kernels.table(result)
    row["weight gradient"] |= {
        "pallas_gpu": row["weight gradient"]["pallas_gpu"] | {"error": float("nan")},
        "tokamax": "failed: x",
    }
    assert "WRONG" in gpu_kernels.table(result) and "failed: x" in gpu_kernels.table(result)


def test_bench_loads():
    """Shares that add up to one; one_hot is all for one expert."""
    shares = {load: of_experts(np.random.default_rng(0), 8) for load, of_experts in gpu_kernels.LOADS.items()}
    assert sorted(shares["one_hot"]) == [0] * 7 + [1] and set(shares["uniform"]) == {1 / 8}
    np.testing.assert_allclose(sorted(shares["zipf"])[::-1], np.arange(1, 9) ** -1.2)


def test_bench_wants_a_gpu():
    with pytest.raises(UserError, match="H100 or H200"):
        gpu_kernels.run(config.Config(), 1)
