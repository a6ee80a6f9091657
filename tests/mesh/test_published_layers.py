"""The layers of published models, first layers and further modules give the same training steps on eight devices as on one (B1)."""

import dataclasses

import jax
import numpy as np
import pytest
from train import small

from moejax import config
from moejax.train import metrics, step

BATCHES = [small.arrays(seed) for seed in range(3)]
COMMON = {
    "model.moe.capacity_factor": None,
    "model.kv_heads": 2,
    "model.heads": 4,
    "model.further": 1,
    "model.moe.transport": "ragged",
}
KINDS = {
    "grouped": {
        "model.first": ("attention+dense",), "model.pattern": ("local+sparse", "attention+sparse"), "model.local.window": 5,
        "model.local.sinks": True, "model.local.bias": True, "model.local.out_bias": True, "model.attention.norm": "whole",
        "model.attention.temperature": 0.2, "model.attention.temperature_positions": 4, "model.moe.router_bias": True,
        "model.rope.fraction": 0.5,
    },
    "latent": {
        "model.first": ("latent+sparse",), "model.pattern": ("latent+sparse",), "model.latent.query_rank": 8, "model.moe.score": "sigmoid",
        "model.moe.selection_bias": True, "model.moe.sign_bias": 0.01, "model.moe.shared_hidden": 8, "model.rope.interleaved": True,
        "model.moe.renormalize": False, "model.moe.gate_at": "input",
    },
}  # fmt: skip
MESHES = [{"fsdp": 2, "expert": 4}, {"context": 2, "expert": 2, "tensor": 2}]


def losses(kind, mesh, **options):
    cfg = dataclasses.replace(small.configure(**COMMON | KINDS[kind] | options), mesh=config.Mesh(**mesh))
    built, now = small.begin(cfg)
    found = []
    with jax.set_mesh(built.mesh), small.quick():
        update = step.make_train_step(built, now).lower(now, small.place(BATCHES[0], built.mesh)).compile()
        for host in BATCHES:
            now, sums, _ = update(now, small.place(host, built.mesh))
            numbers = metrics.of_training(metrics.to_host(sums), cfg.model.moe)
            found.append([numbers[f"train/{name}"] for name in ("loss", "further", "gradient_norm")])
    return np.array(found)


@pytest.mark.parametrize("kind", KINDS)
def test_b01_meshes_change_nothing(kind):
    """Loss, further loss and gradient norm of three steps; also with the scores of four query positions at a time."""
    wanted = losses(kind, {})
    for mesh in MESHES:
        found = losses(kind, mesh, **{"model.query_chunk": 4, "model.remat": "full"})
        np.testing.assert_allclose(found, wanted, rtol=2e-5, err_msg=str(mesh))
