"""Faults brought about in real runs: what is said, how they end, and that the same command goes on to the same end (B22 to B30)."""

import concurrent.futures
import json
import os
import shutil
import signal
import time

import pytest
from train import small

STEPS = 24
OPTIONS = {
    "train.steps": STEPS, "train.warmup": 2, "train.log_every": 1, "train.eval_every": 8, "train.eval_rows": 8, "train.routing_every": 12,
    "checkpoint.every": 6, "model.moe.router": "gshard", "model.moe.sign_bias": 0.01,
}  # fmt: skip
SPIKY = {"train.spike": 1.03, "train.steps": 36, "train.warmup": 1, "faults.bad_batch": 33}


def start(text, workdir, **options):
    flags = small.flags(text, **OPTIONS | options)
    return small.start("train", *flags, f"--workdir={workdir}")


def run(text, workdir, **options):
    return small.finish(start(text, workdir, **options))


def lines(workdir, file="metrics.jsonl"):
    return [json.loads(line) for line in (workdir / file).read_text().splitlines()]


def events(workdir):
    return [line for line in lines(workdir, "events.jsonl") if line["event"] != "ledger"]


def when(process, ready):
    """Waits for a condition in a running process."""
    until = time.monotonic() + 100
    while not ready() and process.poll() is None and time.monotonic() < until:
        time.sleep(0.005)


def one_line(err):
    found = [line for line in err.strip().splitlines() if line.startswith(("error:", "note:"))]
    assert len(found) == 1, err
    return found[0]


def stopped_in_evaluation(text, work):
    """SIGTERM, twice, while an evaluation of many batches is under way; then the same command again."""
    many = {"train.eval_rows": 600, "data.batch": 2, "train.eval_every": 8, "train.steps": 10}
    process = start(text, work, **many)
    when(process, lambda: (work / "metrics.jsonl").exists() and (work / "metrics.jsonl").read_text().count("\n") >= 8)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    return small.finish(process), run(text, work, **many), run(text, work.with_name("undisturbed evaluation"), **many)


def stopped_in_compilation(text, work):
    process = small.start("train", *small.flags(text, **OPTIONS), f"--workdir={work}", cache=None)
    when(process, lambda: (work / "run.json").exists())
    process.send_signal(signal.SIGTERM)
    return small.finish(process), run(text, work)


def copied(text, work):
    """Stopped by a fault, copied elsewhere, reached there over a link and a relative path with a space, and continued."""
    first = run(text, work, **{"faults.raise_at": 15})
    shutil.copytree(work, work.parent / "another place" / "copy", symlinks=True)
    (work.parent / "a link").symlink_to(work.parent / "another place")
    shutil.rmtree(work)
    return first, run(text, os.path.relpath(work.parent / "a link" / "copy", small.ROOT))


def held(text, work):
    """A second run beside a first one that hangs, which its watchdog ends; then a third."""
    process = start(text, work, **{"faults.hang_at": 15, "watchdog.step": 12})
    when(process, lambda: (work / "metrics.jsonl").exists())
    second = run(text, work)
    return small.finish(process), second, run(text, work)


def killed(text, work):
    return run(text, work, **{"faults.die_at": 15}), run(text, work)


def spiked(text, work):
    """A run that goes back, and a fresh one that leaves out the same batches from the start."""
    first = run(text, work, **SPIKY)
    skip = [line["skip"] for line in events(work) if line["event"] == "rolled back"]
    return first, run(
        text, work.with_name("replay of spiked"), **SPIKY, **{"data.skip": tuple(skip[-1] if skip else ())}
    )


SINGLE = {
    "one": {},
    "disk full": {"faults.disk_full_at": 12},
    "slow disk": {"faults.slow_disk": 0.2},
    "corrupt": {"faults.corrupt_record": 1},
    "corrupt but allowed": {"faults.corrupt_record": 1, "data.allow_damaged": True},
}
STORIES = {
    "evaluation": stopped_in_evaluation, "compilation": stopped_in_compilation, "copied": copied, "held": held,
    "killed": killed, "spiked": spiked,
}  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folder of all runs, and what each printed, two at a time."""
    tmp = tmp_path_factory.mktemp("faults")
    text = small.prepared(tmp / "text")
    found = {"one": run(text, tmp / "one")}
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        single = {n: pool.submit(run, text, tmp / n, **o) for n, o in SINGLE.items() if n != "one"}
        stories = {n: pool.submit(story, text, tmp / n) for n, story in STORIES.items()}
        found |= {n: f.result() for n, f in (single | stories).items()}
    assert found["one"][0] == 0, found["one"]
    return tmp, found


def same_end(tmp, name, of="one"):
    """The same metrics, byte for byte, and the last checkpoint's digests."""
    assert (tmp / name / "metrics.jsonl").read_bytes() == (tmp / of / "metrics.jsonl").read_bytes()
    saved = [next(iter(tmp.glob(f"{n}/checkpoints/{STEPS}/_CHECKPOINT_METADATA")), None) for n in (name, of)]
    if all(saved):
        a, b = (json.loads(file.read_text())["custom_metadata"]["digests"] for file in saved)
        assert a == b and len(a) > 10


def test_b27_sigterm_in_an_evaluation(runs):
    """Twice: one checkpoint of the step that is evaluated, exit code 75, and the evaluation is made in the next start."""
    tmp, found = runs
    (code, _, err), again, whole = found["evaluation"]
    assert code == 75 and "stopped and saved at step 8" in one_line(err), err
    assert again[0] == whole[0] == 0, (again, whole)
    assert [line["step"] for line in lines(tmp / "evaluation") if "eval/loss" in line] == [8]
    same_end(tmp, "evaluation", of="undisturbed evaluation")


def test_b27_sigterm_in_the_compilation(runs):
    """The step that was compiled is made and saved."""
    tmp, found = runs
    (code, _, err), again = found["compilation"]
    assert code == 75 and "stopped and saved at step 1;" in one_line(err), err
    assert again[0] == 0 and "resumed at step 1" in again[1]
    same_end(tmp, "compilation")


def test_b22_killed(runs):
    """kill -9 before step 15: the next start takes the last checkpoint that was complete, counts what was lost and ends the same."""
    tmp, found = runs
    (code, _, _), again = found["killed"]
    assert code == -signal.SIGKILL and again[0] == 0
    kinds = {line["event"]: line for line in events(tmp / "killed")}
    assert kinds["resumed"]["step"] in (6, 12) and kinds["resumed"]["lost_steps"] == 14 - kinds["resumed"]["step"]
    assert kinds["lease taken over"]["of"]["count"] >= 0
    same_end(tmp, "killed")


def test_b23_copied_linked_relative_and_with_a_space(runs):
    """The workdir is where it is found."""
    tmp, found = runs
    (code, _, err), again = found["copied"]
    assert code == 1 and "config.faults.raise_at=15" in err
    assert again[0] == 0 and "resumed at step " in again[1], again
    same_end(tmp, "a link/copy")


def test_b25_disk_full(runs):
    """One line, exit code 1, the checkpoint before stays whole."""
    tmp, found = runs
    code, _, err = found["disk full"]
    assert code == 1 and "checkpoint of step 12 could not be written" in one_line(err), err
    verified = small.finish(small.start("verify", str(tmp / "disk full" / "checkpoints"), "--json"))
    assert verified[0] == 0, verified
    assert [(row["step"], row["damage"]) for row in json.loads(verified[1])] == [(6, None)]


def test_b25_b28_two_runs_and_a_watchdog(runs):
    """The second run is refused while the first is alive, though it hangs; the watchdog ends it, with stacks; the third goes on."""
    tmp, found = runs
    (code, _, err), second, third = found["held"]
    assert second[0] == 2 and "belongs to a run that is alive" in one_line(second[2])
    assert code == 1 and "step has not moved for 12 s" in one_line(err)
    assert "before_step" in (tmp / "held" / "stacks.txt").read_text()
    assert third[0] == 0 and "resumed at step " in third[1]
    assert {"hung", "lease taken over", "resumed"} <= {line["event"] for line in events(tmp / "held")}
    same_end(tmp, "held")


def test_a_slow_disk_changes_nothing(runs):
    tmp, found = runs
    assert found["slow disk"][0] == 0
    same_end(tmp, "slow disk")
    ledger = [line for line in lines(tmp / "slow disk", "events.jsonl") if line["event"] == "ledger"][-1]["seconds"]
    assert ledger["save"] >= 4 * 0.2 and ledger["compile"] > 0 and ledger["step"] > 0 and ledger["evaluation"] > 0


def test_b30_a_corrupt_record(runs):
    """File and record are named, exit code 4; where the config allows it, its targets are left out and counted."""
    tmp, found = runs
    code, _, err = found["corrupt"]
    assert code == 4 and "record 0 of" in one_line(err) and "train.array_record cannot be read" in one_line(err), err
    assert found["corrupt but allowed"][0] == 0, found["corrupt but allowed"]
    counted = [line for line in lines(tmp / "corrupt but allowed") if "data/damaged_targets" in line]
    assert sum(line["data/damaged_targets"] for line in counted) > 0
    for line, usual in zip(counted, [line for line in lines(tmp / "one") if "train/loss" in line], strict=True):
        assert line["train/targets"] < usual["train/targets"] or line["data/damaged_targets"] == 0
        assert line["train/targets"] >= usual["train/targets"] - line["data/damaged_targets"]


def test_a_spike_and_its_replay(runs):
    """One bad batch: the run goes back to a checkpoint and leaves out the batches since. A fresh run that leaves them out from the start
    is the same, to the byte."""
    tmp, found = runs
    first, replay = found["spiked"]
    assert first[0] == replay[0] == 0, (first, replay)
    back = [line for line in events(tmp / "spiked") if line["event"] == "rolled back"]
    assert [(line["spike"], line["to"], line["left_out"]) for line in back] == [(33, 30, [30, 33])]
    assert not [line for line in events(tmp / "replay of spiked") if line["event"] == "rolled back"]
    same_end(tmp, "spiked", of="replay of spiked")
