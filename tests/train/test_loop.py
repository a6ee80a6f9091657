"""A run as a user starts it: its files, its end and its continuation (B21, B25, B26, B27)."""

import concurrent.futures
import dataclasses
import json
import math
import signal
import time

import jax
import numpy as np
import pytest
from train import small

from moejax import config
from moejax.checkpoint.manager import Checkpoints
from moejax.errors import ConfigError
from moejax.train.workdir import Workdir

pytestmark = pytest.mark.slow

STEPS = 60
OPTIONS = {
    "train.steps": STEPS, "train.log_every": 1, "train.eval_every": 20, "train.eval_rows": 8, "train.routing_every": 20,
    "checkpoint.every": 15, "model.moe.router": "gshard", "model.moe.jitter": 0.1, "model.moe.sign_bias": 0.01,
}  # fmt: skip
OVERFLOW = {"train.learning_rate": 3.3e38, "train.weight_decay": 10.0, "train.warmup": 0}
BAD = {
    "updates": OVERFLOW | {"checkpoint.every": 1, "train.log_every": 1000},
    "gradients": {"faults.nan_at": 5, "faults.nan_steps": 1000},
}
"""The updates leave fp32 from the first on, seen at a save; gradients are NaN from step 5 on, seen at a log."""

SHORT = {"train.steps": 6, "train.eval_every": 3, "model.moe.capacity_factor": 1.0, "model.moe.reroute": True}
SPECIAL = BAD | {
    "few": {"faults.nan_at": 30, "faults.nan_steps": 3},
    "one": {"train.profile_from": 5, "train.profile_steps": 2},
    "recorded": SHORT | {"train.record_every": 1},
    "replayed": SHORT | {"train.replay": "{tmp}/recorded"},
    "other data": SHORT | {"train.replay": "{tmp}/recorded", "data.seed": 1},
    "too long": SHORT
    | {"train.replay": "{tmp}/recorded", "train.steps": 9, "train.warmup": 1, "train.replay_limit": 1.0},
}


ROUTING = [*(f"{kind}{step:08d}.npz" for step in (20, 40, 60) for kind in ("", "probe_")), "heldout.npz"]


def command(folder, workdir, options):
    flags = [flag.format(tmp=folder.parent) for flag in small.flags(folder, **OPTIONS | options)]
    return small.start("train", *flags, f"--workdir={workdir}")


def interrupted(folder, workdir):
    """Interrupts a run in the midst of its steps and starts it again: (what it printed, its lines), (what it printed then)."""
    process, log = command(folder, workdir, {}), workdir / "metrics.jsonl"
    while process.poll() is None and (not log.exists() or log.read_text().count("\n") < 22):
        time.sleep(0.002)
    process.send_signal(signal.SIGINT)
    return small.finish(process), log.read_text().splitlines(), small.finish(command(folder, workdir, {}))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folder of all runs, and what each printed; two processes at a time, the programs of the first compiled once."""
    tmp = tmp_path_factory.mktemp("loop")
    folder = small.prepared(tmp / "text")
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        chains = ("one", "two", "few"), BAD, ("recorded", "replayed", "other data", "too long")
        run = lambda names: {n: small.finish(command(folder, tmp / n, SPECIAL.get(n, {}))) for n in names}  # noqa: E731
        one, bad, played = pool.map(run, chains)
        return tmp, one | bad | played, interrupted(folder, tmp / "stopped")


def saved(workdir, step=None):
    """(step, state) of a checkpoint of the small config, the newest if no step is given."""
    cfg = small.configure(**OPTIONS)
    checkpoints = Checkpoints(workdir / "checkpoints", cfg.checkpoint)
    step = checkpoints.latest() if step is None else step
    state = None if step is None else small.on_host(checkpoints.restore(step, small.begin(cfg)[1])[0])
    checkpoints.close()
    return step, state


def test_the_files_of_a_run(runs):
    """A workdir holds the files that it should; each logged line has a step and finite named numbers."""
    tmp, answers, _ = runs
    code, out, err = answers["one"]
    assert (code, err) == (0, ""), (code, out, err)
    assert "held-out bits per byte" in out and "gshard 2 of 8 · dropless · gather transport over expert=1" in out
    here = tmp / "one"
    names = {
        "config.json",
        "run.json",
        "metrics.jsonl",
        "timing.jsonl",
        "events.jsonl",
        "routing",
        "tensorboard",
        "checkpoints",
        "profile",
    }
    assert {p.name for p in here.iterdir()} == names
    assert list((here / "profile").rglob("*.xplane.pb")), "the chosen steps leave a trace"
    assert config.from_dict(json.loads((here / "config.json").read_text())).train.steps == STEPS
    run = json.loads((here / "run.json").read_text())
    assert {"plan", "parameters", "devices", "processes", "data_hash", "versions"} <= set(run) and run["processes"] == 1
    lines = [json.loads(line) for line in (here / "metrics.jsonl").read_text().splitlines()]
    assert all(isinstance(v, (int, float)) and math.isfinite(v) for line in lines for v in line.values())
    assert [line["step"] for line in lines if "train/loss" in line] == list(range(1, STEPS + 1))
    assert [line["step"] for line in lines if "eval/loss" in line] == [20, 40]
    assert [line["step"] for line in lines if "heldout/loss" in line] == [STEPS] and "heldout/loss" in lines[-1]
    wanted = {"loss", "cross_entropy", "load_balance", "router_z", "bits_per_byte"}
    assert {f"train/{name}" for name in wanted} | {"moe/drop_rate", "moe/starved", "moe/sign_bias_rms"} <= set(lines[0])
    assert ["eval/churn" in line for line in lines if "eval/loss" in line] == [False, True]
    losses = [line["train/cross_entropy"] for line in lines if "train/loss" in line]
    assert np.mean(losses[-10:]) < np.mean(losses[:10]) - 0.5, "it should learn"
    assert not any("second" in name for line in lines for name in line), "metrics.jsonl knows no clock"
    assert {p.name for p in (here / "routing").iterdir()} == set(ROUTING)
    with np.load(here / "routing" / "00000020.npz") as routing:
        assert (
            routing["sparse.load"].shape == (1, 8)
            and routing["sparse.load"].sum() == routing["sparse.routed"].sum() > 0
        )
    with np.load(here / "routing" / "heldout.npz") as routing:
        assert routing["sparse.labels"].shape == (1, 2, 8) and routing["sparse.coactivation"].shape == (1, 8, 8)
    with np.load(here / "routing" / "probe_00000040.npz") as probe:
        assert probe["experts"].shape == (1, small.B * small.T, 2) and probe["valid"].shape == (small.B * small.T,)


def test_b21_twice_is_the_same(runs):
    """B21: two runs of sixty steps leave bit-equal states and the same metrics, byte for byte."""
    tmp, answers, _ = runs
    assert answers["two"][0] == 0
    assert (tmp / "one" / "metrics.jsonl").read_bytes() == (tmp / "two" / "metrics.jsonl").read_bytes()
    (step, one), (_, two) = saved(tmp / "one"), saved(tmp / "two")
    assert step == STEPS
    small.equal(one, two)


def test_b22_interrupted_is_the_same(runs):
    """B22, B27 for SIGINT: it saves, exits with 75 and one line, and the same command goes on; in the end metrics, routing,
    probes and state, with its biases, are those of the undisturbed run, bit for bit."""
    tmp, _, ((code, out, err), lines, again) = runs
    assert code == 75, (code, out, err)
    assert len(err.strip().splitlines()) == 1 and "the same command goes on from there" in err
    assert 20 <= json.loads(lines[-1])["step"] < STEPS
    assert again[0] == 0 and "resumed at step" in again[1], again
    one, stopped = tmp / "one", tmp / "stopped"
    assert (one / "metrics.jsonl").read_bytes() == (stopped / "metrics.jsonl").read_bytes()
    small.equal(saved(one)[1], saved(stopped)[1])
    assert saved(one)[1].routing["sparse"]["sign_bias"].any()
    for name in ROUTING:
        with np.load(one / "routing" / name) as a, np.load(stopped / "routing" / name) as b:
            small.equal(dict(b), dict(a))
    events = [json.loads(line)["event"] for line in (stopped / "events.jsonl").read_text().splitlines()]
    assert [e for e in events if e != "ledger"] == ["stopped", "resumed"]


@pytest.mark.parametrize("name", BAD)
def test_b26_bad_numbers_end_the_run(runs, name):
    """B26: after max_bad_steps bad steps in a row one line with a remedy and exit code 3; the weights are those of before the first, and
    no state that is not finite was saved."""
    tmp, answers, _ = runs
    code, out, err = answers[name]
    assert code == 3, (code, out, err)
    assert len(err.strip().splitlines()) == 1 and err.startswith("error: 20 steps in a row up to step ")
    assert "Lower train.learning_rate" in err
    bad_from = 1 if name == "updates" else 5
    step, state = saved(tmp / name)
    assert step == bad_from + 18 if name == "updates" else step == 15
    assert state.guard["skipped"] == state.guard["row"] == step - bad_from + 1
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state))
    if name == "updates":
        small.equal(state.parameters, small.on_host(small.begin(small.configure(**OPTIONS))[1]).parameters)
    log = tmp / name / "metrics.jsonl"
    assert not log.exists() or ("NaN" not in log.read_text() and "Infinity" not in log.read_text())


def test_b26_a_few_bad_steps_are_skipped(runs):
    """B26: three bad steps change neither weights nor moments nor biases, are counted, and the run goes on to its end."""
    tmp, answers, _ = runs
    assert answers["few"][0] == 0, answers["few"]
    lines, wanted = lines_of(tmp / "few"), lines_of(tmp / "one")
    trained = {line["step"]: line for line in lines if "train/skipped_steps" in line}
    assert [trained[s]["train/skipped_steps"] for s in (29, 30, 31, 32, 33, STEPS)] == [0, 1, 2, 3, 3, 3]
    assert [line for line in lines if line["step"] < 30] == [line for line in wanted if line["step"] < 30]
    assert "train/loss" in trained[30], "the loss was finite, the gradient was not"
    assert not any("gradient_norm" in name for name in trained[31]) and math.isfinite(
        trained[33]["train/gradient_norm"]
    )
    state = saved(tmp / "few")[1]
    assert state.step == STEPS and state.guard["worst"] == 3 and state.guard["row"] == 0
    moments = [x for x in jax.tree.leaves(state.optimizer) if x.dtype == np.int32]
    assert all(count == STEPS - 3 for count in moments)


def lines_of(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_a_replayed_run_is_the_recorded_one(runs):
    """From the disk of another run: the same metrics, byte for byte, but for the count of differences, which is 0."""
    tmp, answers, _ = runs
    assert answers["recorded"][0] == answers["replayed"][0] == 0, (answers["recorded"], answers["replayed"])
    assert {p.name for p in (tmp / "recorded" / "assignments").iterdir()} == {f"{step:08d}.npz" for step in range(1, 7)}
    assert not (tmp / "replayed" / "assignments").exists()
    played = lines_of(tmp / "replayed")
    assert [line.pop("moe/mismatched") for line in played if "train/loss" in line] == [0] * 6
    assert played == lines_of(tmp / "recorded") and played[0]["moe/reroute_rate"] > 0


def test_a_replay_of_something_else_ends_the_run(runs):
    """Other data: exit code 3 and the layer that differs. More steps than were recorded: exit code 4 and the file that is missing."""
    _, answers, _ = runs
    code, out, err = answers["other data"]
    assert (
        code == 3 and "replay at step 1: the router of sparse layer 0" in err and len(err.strip().splitlines()) == 1
    ), (out, err)
    code, out, err = answers["too long"]
    assert code == 4 and "00000007.npz cannot be read" in err and len(err.strip().splitlines()) == 1, (out, err)


def test_a_workdir_belongs_to_its_config(tmp_path):
    """A run with another config is refused with what differs; options that change no learning may differ."""
    cfg = small.configure()
    Workdir(str(tmp_path), cfg, primary=False).close()
    assert not list(tmp_path.iterdir()), "only the first host writes"
    Workdir(str(tmp_path), cfg, primary=True).close()
    before = (tmp_path / "config.json").read_bytes()
    for name, value in (("train.learning_rate", 1.0), ("model.moe.top_k", 3), ("data.seed", 1)):
        with pytest.raises(ConfigError, match=rf"{name}: .* -> {value}.*choose another --workdir"):
            Workdir(str(tmp_path), small.configure(**{name: value}), primary=True)
    moved = dataclasses.replace(cfg, mesh=config.Mesh(fsdp=2), checkpoint=config.Checkpoint(every=3))
    Workdir(str(tmp_path), moved, primary=True).close()
    assert (tmp_path / "config.json").read_bytes() == before
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"config\.json is not JSON"):
        Workdir(str(tmp_path), cfg, primary=True)


def test_truncate_forgets_later_lines(tmp_path):
    """Lines of later steps, of the end, and one cut short by a crash go; the rest stays as written."""
    files = Workdir(str(tmp_path), small.configure(), primary=True)
    for step in (1, 2, 3):
        files.log(step, {"train/loss": 0.1 * step})
    files.log(2, {"heldout/loss": 1.0})
    kept = (tmp_path / "metrics.jsonl").read_text().splitlines(keepends=True)[:2]
    with open(tmp_path / "metrics.jsonl", "a") as out:
        out.write('{"step": 2, "train/')
    files.truncate(2)
    assert (tmp_path / "metrics.jsonl").read_text() == "".join(kept)
    files.truncate(0)
    assert (tmp_path / "metrics.jsonl").read_text() == ""
    files.close()
