"""Fifty steps on other meshes with the routing of one device played back: the loss of every step is that of one device.

`scripts/bench.py meshes` does this with the tiny experiment, and without the playing back; here the model is small.
"""

import dataclasses

import jax
import pytest
from train import small

from moejax import config, sharding
from moejax.train import metrics, recordings, step

STEPS = 50
OPTIONS = {
    "model.kv_heads": 2, "model.moe.transport": "ragged", "model.moe.capacity_factor": 1.25, "model.moe.sign_bias": 0.001,
    "model.moe.jitter": 0.01, "train.steps": STEPS, "train.record_every": 1,
}  # fmt: skip
MESHES = {
    "data 8": {"data": 8},
    "expert 8": {"expert": 8},
    "fsdp 2, expert 4": {"fsdp": 2, "expert": 4},
    "expert 4, tensor 2": {"expert": 4, "tensor": 2},
    "context 2, expert 4": {"context": 2, "expert": 4},
}
BATCHES = [small.arrays(seed) for seed in range(STEPS)]


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """(workdir of the recorded routing, losses) on one device."""
    workdir = tmp_path_factory.mktemp("one")
    trace = small.trace(small.configure(**OPTIONS), BATCHES)
    for number, routing in enumerate(trace.recorded, start=1):
        recordings.save(workdir, number, routing)
    return workdir, [n["train/loss"] for n in trace.numbers]


@pytest.mark.slow
@pytest.mark.parametrize("name", MESHES)
def test_b01_fifty_steps_are_those_of_one_device(one, name):
    workdir, wanted = one
    cfg = small.configure(**OPTIONS | {"train.replay": str(workdir), "train.record_every": 0})
    cfg = dataclasses.replace(cfg, mesh=config.Mesh(**MESHES[name]))
    built, now = small.begin(cfg)
    where, losses, update = sharding.groups_sharding(built.mesh), [], None
    with jax.set_mesh(built.mesh):
        for number, host in enumerate(BATCHES, start=1):
            played = recordings.load(cfg.train.replay, number, small.B, where)
            arguments = now, small.place(host, built.mesh), played
            if update is None:
                with small.quick():
                    update = step.make_train_step(built, now, replay=True).lower(*arguments).compile()
            now, sums, _ = update(*arguments)
            losses.append(metrics.of_training(metrics.to_host(sums), cfg.model.moe)["train/loss"])
    assert wanted[-1] < 0.95 * wanted[0]
    assert losses == pytest.approx(wanted, rel=1e-5)
