"""What is watched beside the loss: hungry experts, churn of a fixed probe, and spikes of the gradient."""

import json

import jax
import numpy as np
import optax
import pytest
from train import small

from moejax import config
from moejax.errors import DamagedError
from moejax.train import optimizer, watch
from moejax.train.progress import Reporter
from moejax.train.workdir import Workdir

MOE = config.MoE(num_experts=4, alarm_after=10, alarm_share=0.1)


def fed(*layers):
    return {"sparse": {"last_fed": np.array(layers, np.int32)}}


def test_the_alarm_names_layer_experts_and_since():
    """One line for each layer with experts unfed for `alarm_after` steps: which, and the first hungry step of each."""
    routing = fed([30, 30, 30, 30], [30, 19, 30, 5], [30, 30, 20, 21])
    lines = watch.alarms(routing, 30, MOE)
    assert lines == [
        "collapse: sparse layer 1 below 0.1 of a fair load: expert 1 since step 20, expert 3 since step 6",
        "collapse: sparse layer 2 below 0.1 of a fair load: expert 2 since step 21",
    ]
    assert watch.starved(routing, 30, MOE) == 3 and watch.starved({}, 30, MOE) == 0
    assert watch.alarms(routing, 29, MOE) == [lines[0]] and watch.alarms({}, 30, MOE) == []


def test_the_alarm_is_said_once(tmp_path, capsys):
    """To the console and events.jsonl when it begins, when another expert joins, and again after it was over; the number of
    hungry experts every time."""
    files = Workdir(str(tmp_path), small.configure(), primary=True)
    alarm = watch.Alarm(MOE, files, Reporter("run", 100))
    story = [
        ([5, 20, 20, 20], 20),
        ([5, 30, 30, 30], 30),
        ([5, 29, 40, 40], 40),
        ([50, 50, 50, 50], 50),
        ([5, 60, 60, 60], 60),
    ]
    numbers = [alarm.sound(fed(layer), step) for layer, step in story]
    files.close()
    assert [n["moe/starved"] for n in numbers] == [1, 1, 2, 0, 1]
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert [(e["event"], e["step"]) for e in events] == [("collapse", 20), ("collapse", 40), ("collapse", 60)]
    assert (
        "expert 0 since step 6, expert 1 since step 30" in events[1]["alarm"] and "since step 6" in events[0]["alarm"]
    )
    assert capsys.readouterr().out.count("collapse: sparse layer 0") == 3
    assert alarm.sound({}, 70) == {}


def probe(experts, valid):
    return {"experts": np.array(experts, np.int32), "valid": np.array(valid)}


FIRST = probe([[[0, 1], [2, 3], [0, 2]], [[0, 1], [0, 1], [0, 1]]], [True, True, False])
SECOND = probe([[[1, 0], [2, 1], [3, 1]], [[0, 1], [1, 0], [3, 2]]], [True, True, False])
"""Two layers, two choices, three tokens of which the last is none: in layer 0 one of two tokens changed one of its experts."""


def test_churn_and_saturation_of_planted_probes(tmp_path):
    """Against the probe of the evaluation before this step; the worst layer; agreement with the last."""
    files = Workdir(str(tmp_path), small.configure(), primary=True)
    assert watch.churn(tmp_path, 10, FIRST) == {}
    files.save_probe(10, FIRST)
    files.save_probe(30, probe(9 * np.ones((2, 3, 2)), [True] * 3))
    files.close()
    found = watch.churn(tmp_path, 20, SECOND)
    assert found == {"eval/churn": 0.25, "eval/churn_worst": 0.5}
    assert watch.churn(tmp_path, 20, {}) == {}
    files.save_probe(30, SECOND)
    assert [(step, shares.tolist()) for step, shares in watch.saturation(tmp_path)] == [
        (10, [0.75, 1.0]),
        (30, [1.0, 1.0]),
    ]
    assert watch.saturation(tmp_path / "none") == [] and watch.step_of(tmp_path / "probe_00000010.npz") == 10


def test_agreement_with_a_reference(tmp_path):
    """Mean and worst layer; nothing without a reference; what is no probe of the same tokens is refused by name."""
    file = tmp_path / "probe.npz"
    np.savez(file, **FIRST)
    assert watch.agreement(str(file), SECOND) == {"eval/agreement": 0.875, "eval/agreement_worst": 0.75}
    assert watch.agreement("", SECOND) == {}
    for other in ({}, probe(SECOND["experts"][:1], SECOND["valid"]), probe(SECOND["experts"], [True] * 3)):
        with pytest.raises(DamagedError, match=r"probe\.npz is of 2 layers and 3 other tokens; give a probe"):
            watch.agreement(str(file), other)
    file.write_bytes(file.read_bytes()[:99])
    for missing in (file, tmp_path / "none.npz"):
        with pytest.raises(DamagedError, match="cannot be read as a probe"):
            watch.agreement(str(missing), SECOND)


# ---- the spike guard --------------------------------------------------------------------------------------------------


def spikes(norms, multiple):
    """(norms that come through, running mean) by plain NumPy: free for twenty steps, then at most a multiple of the mean of
    what came through, over the last hundred steps or so."""
    passed, mean = [], 0.0
    for i, norm in enumerate(norms):
        kept = min(norm, multiple * mean) if i >= 20 else norm
        mean += (kept - mean) / min(i + 1, 100)
        passed.append(kept)
    return passed, mean


def test_spikes_are_clipped_as_in_numpy():
    """A gradient of ten times the usual norm passes while the guard warms up and is cut later; its direction stays, and the
    mean moves by what came through."""
    rng = np.random.default_rng(0)
    norms = rng.uniform(0.8, 1.2, 150)
    norms[[5, 60, 61, 149]] = 10.0
    norms[100:149] *= 3
    guard = optimizer.clip_spikes(2.0)
    direction = {"a": np.float32([0.6, 0]), "b": np.float32([[0.8]])}
    state, update, passed = guard.init(direction), jax.jit(guard.update), []
    for norm in norms:
        clipped, state = update(jax.tree.map(lambda x, n=norm: np.float32(n) * x, direction), state)
        passed.append(float(optax.tree.norm(clipped)))
        np.testing.assert_allclose(clipped["a"][0] / clipped["b"][0, 0], 0.75, rtol=1e-5)
    wanted, mean = spikes(norms, 2.0)
    np.testing.assert_allclose(passed, wanted, rtol=1e-5)
    assert float(state.mean) == pytest.approx(mean, rel=1e-5) and int(state.steps) == 150
    assert passed[5] == pytest.approx(10) and max(passed[20:]) < 5 and np.array(passed)[20:60].max() < 1.3


def test_a_gradient_of_zeros_is_no_division_by_zero():
    guard = optimizer.clip_spikes(2.0)
    state = guard.init(np.zeros(3, np.float32))
    for _ in range(25):
        clipped, state = guard.update(np.zeros(3, np.float32), state)
    assert not np.asarray(clipped).any() and float(state.mean) == 0


def test_the_guard_is_part_of_the_optimiser():
    """Off by default; on, its mean is in the state, and the global norm is clipped as well."""
    train = small.configure(**{"train.clip_spike": 3.0, "train.clip_norm": 0.5}).train
    gradient = {"w": np.full(4, 3.0, np.float32)}
    guarded, plain = (
        str(jax.tree.structure(optimizer.clipping(c).init(gradient))) for c in (train, small.configure().train)
    )
    assert "SpikeState" in guarded and "SpikeState" not in plain
    clipped, _ = optimizer.clipping(train).update(gradient, optimizer.clipping(train).init(gradient))
    assert float(optax.tree.norm(clipped)) == pytest.approx(0.5)
