"""TPU kernels inside the layer where there is no TPU: interpreted, under shard_map with its checks on (B9, B13)."""

import os
import pathlib
import subprocess
import sys

import cases
import harness
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from train import small

from moejax import collectives, sharding
from moejax.errors import ConfigError
from moejax.kernels.grouped_matmul import grouped_matmul
from moejax.moe.inputs import Mode

SCRIPT = pathlib.Path(__file__).with_name("interpreted.py")


def test_tpu_kernels_in_a_layer(mesh_of):
    """Two devices of a process that has more threads."""
    moe = cases.configure("topk-plain", kernel="pallas_tpu")
    p, mode = harness.problem(moe, seed=1), Mode(True, None)
    harness.same(harness.run(p, mesh_of(expert=2), moe, mode), harness.expected(p, moe, mode))


def test_tpu_kernels_in_layers_that_are_scanned(mesh_of):
    """As in a model: derivatives of a scan around shard_map, traced more than once."""
    draw = np.random.default_rng(0).normal
    w, x = (jnp.float32(draw(size=shape)) for shape in ((2, 3, 8, 8), (48, 8)))
    batch, sizes = sharding.spec("batch"), jnp.asarray([10, 0, 14], jnp.int32)

    def gradients(impl):
        def rows(x, w):
            return grouped_matmul(x, collectives.vary_like(w, x), collectives.vary_like(sizes, x), impl=impl)

        one = jax.shard_map(rows, in_specs=(batch, sharding.spec()), out_specs=batch)
        through = lambda x, w: jax.lax.scan(lambda x, w: (jnp.sin(one(x, w)), None), x, w)[0]  # noqa: E731
        return jax.jit(jax.grad(lambda x, w: jnp.sum(through(x, w)), argnums=(0, 1)))(x, w)

    with jax.set_mesh(mesh_of(data=2)):
        x = jax.reshard(x, batch)
        for got, wanted in zip(gradients("pallas_tpu"), gradients("reference"), strict=True):
            harness.close(got, wanted)


@pytest.mark.slow
def test_tpu_kernels_on_eight_devices():
    env = {**os.environ, "NPROC": "16"}
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT)], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    code, out, err = small.finish(process, 300)
    assert code == 0 and out.count("is the oracle's") == 2, (out[-2000:], err[-4000:])


def test_too_few_threads(mesh_of, monkeypatch):
    """Said in one line, before anything waits for ever."""
    monkeypatch.setenv("NPROC", "8")
    moe = cases.configure("topk-plain", kernel="pallas_tpu")
    p = harness.problem(moe, rows=8, seed=1)
    with pytest.raises(ConfigError, match="pallas_tpu on cpu, interpreted on 8 devices with 8 threads.*NPROC=16"):
        harness.run(p, mesh_of(expert=8), moe, Mode(True, None))
