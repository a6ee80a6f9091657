"""Routing recorded and played back: the same run, on any mesh; anything else is refused by name (B1 over many steps)."""

import dataclasses

import jax
import numpy as np
import pytest
from train import small

from moejax import config, sharding
from moejax.arrays import NOWHERE
from moejax.errors import DamagedError, DivergedError
from moejax.moe.replay import Recorded
from moejax.train import metrics, recordings, step

OPTIONS = {
    "model.repeats": 2, "model.moe.router": "noisy_topk", "model.moe.sign_bias": 0.01, "model.moe.capacity_factor": 1.0,
    "model.moe.transport": "scatter", "model.moe.reroute": True, "model.moe.jitter": 0.1, "train.learning_rate": 3e-2,
    "train.epsilon": 1e-2,
}  # fmt: skip
ELSEWHERE = {"mesh.fsdp": 2, "mesh.expert": 2, "train.microbatches": 2}
STEPS = 3
BATCHES = [small.arrays(seed) for seed in range(STEPS)]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """(workdir, trace) of a run that records every step."""
    workdir = tmp_path_factory.mktemp("recorded")
    with small.exact():
        trace = small.trace(small.configure(**OPTIONS | {"train.record_every": 1}), BATCHES)
    for number, routing in enumerate(trace.recorded, start=1):
        recordings.save(workdir, number, routing)
    return workdir, trace


_STEPS = {}


def replay(workdir, batches, router=1.0, **options):
    """(metrics, sums of every step, parameters after the last) of a run that plays `workdir` back, its router scaled."""
    cfg = small.configure(**OPTIONS | {"train.replay": str(workdir)} | options)
    built, now = small.begin(cfg)
    scale = lambda path, x: x * np.float32(router) if "router" in jax.tree_util.keystr(path) else x  # noqa: E731
    now = dataclasses.replace(now, parameters=jax.tree_util.tree_map_with_path(scale, now.parameters))
    found = []
    with jax.set_mesh(built.mesh):
        for number, host in enumerate(batches, start=1):
            played = recordings.load(cfg.train.replay, number, small.B, sharding.groups_sharding(built.mesh))
            arguments = (now, small.place(host, built.mesh), played)
            if cfg not in _STEPS:
                with small.quick(), small.exact():
                    _STEPS[cfg] = step.make_train_step(built, now, replay=True).lower(*arguments).compile()
            now, sums, _ = _STEPS[cfg](*arguments)
            found.append(metrics.to_host(sums))
    return small.numbers_of(found, cfg), found, small.on_host(now.parameters)


def test_a_replay_is_the_same_run(recorded):
    """Bit-equal metrics and parameters over three steps with noise, jitter, rerouting and drops; no request differs."""
    workdir, wanted = recorded
    numbers, sums, parameters = replay(workdir, BATCHES)
    assert [n.pop("moe/mismatched") for n in numbers] == [0] * STEPS
    assert numbers == wanted.numbers
    small.equal(parameters, wanted.parameters)
    for one in sums:
        recordings.require_match(one["layers"], 0.0, 1)


def test_a_replay_on_another_mesh(recorded):
    """Recorded on one device, played back on four in two microbatches: every request as recorded, reals to rounding."""
    workdir, wanted = recorded
    numbers, sums, parameters = replay(workdir, BATCHES, **ELSEWHERE)
    assert [n.pop("moe/mismatched") for n in numbers] == [0] * STEPS
    small.close(numbers, wanted.numbers)
    small.close(parameters, wanted.parameters, 2e-5)
    for one, other in zip(sums, wanted.sums, strict=True):
        for name in ("requests", "load", "rerouted", "dropped"):
            np.testing.assert_array_equal(one["layers"]["sparse"][name], other["layers"]["sparse"][name])


def test_gates_are_recomputed(recorded):
    """A replay with another router keeps who goes where and has another loss; the requests that differ are counted."""
    workdir, wanted = recorded
    numbers, sums, _ = replay(workdir, BATCHES[:1], router=-1.0)
    np.testing.assert_array_equal(sums[0]["layers"]["sparse"]["load"], wanted.sums[0]["layers"]["sparse"]["load"])
    assert numbers[0]["train/loss"] != wanted.numbers[0]["train/loss"] and numbers[0]["moe/mismatched"] > 20


def test_other_data_is_refused(recorded):
    """Played back on other rows, nearly every request differs."""
    _, sums, _ = replay(recorded[0], [small.arrays(7)])
    with pytest.raises(DivergedError, match=r"replay at step 5: .*more than train\.replay_limit=50\.00%"):
        recordings.require_match(sums[0]["layers"], 0.5, 5)
    recordings.require_match(sums[0]["layers"], 1.0, 5)


def test_the_layer_that_differs_most_is_named():
    """Its share against the limit, which may just be reached; a layer without requests is no division by zero."""
    layers = {"sparse": {"mismatched": np.array([1, 8, 0]), "requested": np.array([100, 200, 0])}}
    with pytest.raises(
        DivergedError, match=r"sparse layer 1 .* 4\.00% .*replay_limit=3\.00%; replay the same config and data"
    ):
        recordings.require_match(layers, 0.03, 5)
    recordings.require_match(layers, 0.04, 5)


def test_files_that_cannot_be_read(recorded, tmp_path):
    """Missing, cut short, without a part, of a larger batch: which file, and how a replay is made."""
    whole = sharding.replicated(small.begin(small.configure(**OPTIONS))[0].mesh)
    workdir, _ = recorded
    with pytest.raises(DamagedError, match=r"00000009\.npz cannot be read .*train\.record_every=1"):
        recordings.load(str(workdir), 9, small.B, whole)
    (tmp_path / "assignments").mkdir()
    file = tmp_path / "assignments" / "00000001.npz"
    content = (workdir / "assignments" / file.name).read_bytes()
    for damaged in (b"", content[:100], content[: len(content) // 2]):
        file.write_bytes(damaged)
        with pytest.raises(DamagedError, match=r"00000001\.npz cannot be read"):
            recordings.load(str(tmp_path), 1, small.B, whole)
    np.savez(file, **{"sparse.token": np.zeros((1, 8, 4), np.int32)})
    with pytest.raises(DamagedError, match="cannot be read"):
        recordings.load(str(tmp_path), 1, small.B, whole)
    with pytest.raises(DamagedError, match=r"routing of 8 groups where this run has 7; .*data\.batch"):
        recordings.load(str(workdir), 1, 7, whole)


def test_padding_rows_come_and_go(tmp_path):
    """A mesh that pads the batch with more rows, or fewer, reads the same groups; those of padding ask for nothing."""
    whole = sharding.replicated(small.begin(small.configure(**OPTIONS))[0].mesh)
    rng = np.random.default_rng(0)
    drawn = [rng.integers(0, 5, (2, 6, 4)).astype(np.int32) for _ in Recorded._fields]
    drawn[3] = drawn[3] > 1
    recordings.save(tmp_path, 1, {"sparse": Recorded(*drawn)})
    wide = recordings.load(str(tmp_path), 1, 8, whole)["sparse"]
    assert not np.asarray(wide.asked)[:, 6:].any() and (np.asarray(wide.slot)[:, 6:] == NOWHERE).all()
    recordings.save(tmp_path, 2, {"sparse": wide})
    small.equal(recordings.load(str(tmp_path), 2, 6, whole)["sparse"], Recorded(*drawn))


@pytest.mark.parametrize(
    "options", [{}, {"model.moe.group_rows": 2}, {"model.moe.group_window": 4}], ids=["rows", "pairs", "windows"]
)
@pytest.mark.parametrize("sizes", [{}, {"data": 2, "expert": 2}], ids=["one device", "four"])
def test_microbatches_take_their_groups(options, sizes):
    """Groups go to the microbatch of their rows, and come back in order."""
    cfg = small.configure(**options | {"train.microbatches": 2})
    cfg = dataclasses.replace(cfg, mesh=config.Mesh(**sizes))
    built, _ = small.begin(cfg)
    rows, moe = 16, cfg.model.moe
    windows = 1 if moe.group_window is None else small.T // moe.group_window
    first = np.arange(0, rows, moe.group_rows, dtype=np.int32).repeat(windows)
    marked = np.stack([first, first + 100])[..., None].repeat(3, axis=2)
    host = small.arrays(0, rows)
    with jax.set_mesh(built.mesh):
        placed = {"sparse": Recorded(*[jax.device_put(marked, sharding.groups_sharding(built.mesh))] * 7)}
        split = small.quick_jit(lambda r: step.split_recordings(r, cfg))(placed)
        joined = small.quick_jit(lambda r: step.join_recordings(r, cfg))(split)
        batches = small.quick_jit(lambda b: step.split_microbatches(b, 2, moe.group_rows))(
            small.place(host, built.mesh)
        )
    small.equal(joined, placed)
    for part in range(2):
        of_rows = np.asarray(batches.row_ids)[part][:: moe.group_rows].repeat(windows)
        np.testing.assert_array_equal(np.asarray(split["sparse"].token)[part, 0, :, 0], of_rows)
        np.testing.assert_array_equal(np.asarray(split["sparse"].token)[part, 1, :, 2], of_rows + 100)
