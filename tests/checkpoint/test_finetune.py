"""A published checkpoint trains on: twenty steps with experts on four devices are those of one device, and a published bias stays."""

import dataclasses
import pathlib

import jax
import numpy as np
import pytest
from train import small

from moejax import config, mesh, sharding
from moejax.checkpoint.hugging_face.published import open_published
from moejax.moe.replay import Recorded
from moejax.train import metrics, recordings, starts, state, step

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
STEPS, SEVERAL = 20, 4
OPTIONS = {
    "train.steps": STEPS, "train.learning_rate": 3e-3, "train.final_learning_rate": 3e-3, "train.warmup": 2, "train.record_every": 1,
}  # fmt: skip
BALANCED = {
    "qwen3_moe": {"load_balance": 0.01, "router_z": 0.001},
    "deepseek_v3": {"sign_bias": 0.001},
}
"""How each is kept even while it trains: 12 experts by a loss, 16 in groups by a bias beside the published one."""
MESHES = {"fsdp 2, expert 4": {"fsdp": 2, "expert": 4}, "data 2, expert 4": {"data": 2, "expert": 4}}
BIAS, OWN = "selection_bias", "sign_bias"


def batches():
    """A few batches again and again, so that there is something to learn; tokens are those that the models have."""
    few = [small.arrays(seed) for seed in range(SEVERAL)]
    for rows in few:
        rows["tokens"], rows["targets"] = rows["tokens"] % 88, rows["targets"] % 88
    return [few[i % SEVERAL] for i in range(STEPS)]


def trained(name, replayed=(), **devices):
    """(losses, the routing state before and after, recorded routing) of a converted checkpoint on so many devices."""
    published = open_published(GOLDEN / name)
    moe = dataclasses.replace(published.model.moe, transport="ragged", **BALANCED[name])
    cfg = dataclasses.replace(
        small.configure(**OPTIONS), model=dataclasses.replace(published.model, moe=moe), mesh=config.Mesh(**devices)
    )
    on = mesh.make(cfg.mesh, jax.devices()[: int(np.prod(mesh.shape(cfg.mesh)))])
    built = state.build(cfg, on)
    now, _ = starts.of_published(built, published)
    before, losses, recorded = small.on_host(now.routing), [], []
    with jax.set_mesh(on), small.quick():
        update = step.make_train_step(built, now, replay=bool(replayed))
        for number, host in enumerate(batches()):
            played = [placed(replayed[number], on)] if replayed else []
            now, sums, routed = update(now, small.place(host, on), *played)
            layers = metrics.to_host(sums)
            if replayed:
                recordings.require_match(layers["layers"], cfg.train.replay_limit, number)
            losses.append(metrics.of_training(layers, moe)["train/loss"])
            recorded.append(small.on_host(routed))
    return losses, before, small.on_host(now.routing), recorded


def placed(recorded, on):
    put = lambda x: jax.device_put(x, sharding.groups_sharding(on))  # noqa: E731
    return {kind: Recorded(*map(put, found)) for kind, found in recorded.items()}


@pytest.fixture(scope="module")
def one():
    """On one device, each trained once."""
    found = {}
    return lambda name: found.setdefault(name, trained(name))


@pytest.mark.slow
@pytest.mark.parametrize("devices", MESHES)
@pytest.mark.parametrize("name", BALANCED)
def test_b01_fine_tuning_with_expert_parallelism(one, name, devices):
    """Every loss is that of one device to 1e-5, as in tests/mesh/test_equal_training.py: float32 sums come in another order, and its
    routing is played back, since a tie that rounding decides would send a token elsewhere and the two would be other runs from there.
    The router would decide fewer than 1 % otherwise. Biases, which move by counts alone, are equal to the bit."""
    wanted, before, after, recorded = one(name)
    losses, start, end, _ = trained(name, recorded, **MESHES[devices])
    assert wanted[-1] < 0.95 * wanted[0]
    assert losses == pytest.approx(wanted, rel=1e-5)
    small.equal(start, before)
    small.equal(end, after)


@pytest.mark.slow
def test_a_published_bias_stays_and_a_balancer_moves_its_own(one):
    """By whole steps of its size, twenty at most."""
    _, before, after, _ = one("deepseek_v3")
    before, after, size = before["sparse"], after["sparse"], BALANCED["deepseek_v3"][OWN]
    assert before[BIAS].std() > 0.01 and before[BIAS].tobytes() == after[BIAS].tobytes()
    moved = after[OWN] / size
    assert not before[OWN].any() and np.abs(moved).max() > 1
    np.testing.assert_allclose(moved, np.round(moved), atol=1e-4)
    assert np.abs(moved).max() <= STEPS + 1e-4
