"""TPU kernels inside the layer where there is no TPU: interpreted, under shard_map with its checks on (B9, B13)."""

import os
import pathlib
import subprocess
import sys

import cases
import harness
import pytest
from train import small

from moejax.errors import ConfigError
from moejax.moe.inputs import Mode

SCRIPT = pathlib.Path(__file__).with_name("interpreted.py")


def test_tpu_kernels_in_a_layer(mesh_of):
    """Two devices of a process that has more threads."""
    moe = cases.configure("topk-plain", kernel="pallas_tpu")
    p, mode = harness.problem(moe, seed=1), Mode(True, None)
    harness.same(harness.run(p, mesh_of(expert=2), moe, mode), harness.expected(p, moe, mode))


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
