"""A sweep on this machine, as a user starts it: one that is killed goes on and repeats nothing; a run that fails is marked and the others
go on. And its results, by hand."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from train import small

from moejax.errors import UserError
from moejax.sweep import local, picture, results, states
from moejax.sweep.members import members
from moejax.sweep.states import State

SWEEP = """
import importlib.util

def get_config():
    spec = importlib.util.spec_from_file_location("tiny", {tiny!r})
    tiny = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tiny)
    return tiny.get_config()

def sweep(add):
    for seed in (0, 1):
        add({{"train.seed": seed}}, **{{"train.steps": 40, "checkpoint.every": 4}})
    add({{"faults.raise_at": 3}})
"""


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep")
    file = folder / "some.py"
    file.write_text(SWEEP.format(tiny=str(small.ROOT / "configs" / "tiny.py")))
    options = small.flags(
        small.prepared(folder / "text"), **{"train.log_every": 2, "train.eval_every": 20, "train.eval_rows": 8}
    )
    return [f"--config={file}", *options[1:], f"--workdir={folder}/runs", "--at_once=2"], folder / "runs"


def lines(root):
    """Steps of metrics.jsonl by run."""
    return {
        folder.name: [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in root.iterdir()
        if (folder / "metrics.jsonl").exists()
    }


@pytest.mark.slow
def test_a_killed_sweep_goes_on(command):
    """SIGKILL in the middle: the runs save and end by themselves; the same command ends them, each line of each run is there once; the
    third command does nothing but show the table. The run that fails does so once, and again only when asked to."""
    arguments, root = command
    first = small.start("sweep", *arguments)
    until = time.monotonic() + 120
    while time.monotonic() < until and not any(
        len(steps) > 2 for steps in (lines(root) if root.exists() else {}).values()
    ):
        time.sleep(0.1)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    assert not all(steps[-1] == 40 for steps in lines(root).values())
    again = small.start("sweep", *arguments)
    output, errors = again.communicate(timeout=300)
    assert again.returncode == 1, errors
    assert "raise_at=3: failed, exit code 1" in errors
    assert "2/2" in output and "0/1" in output
    events = [json.loads(line) for line in (root / states.JOURNAL).read_text().splitlines()]
    for name, steps in lines(root).items():
        if "seed" in name:
            assert steps == [2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 20, 22, 24, 26, 28, 30, 32, 34, 36, 38, 40, 40]
    resumed = [json.loads(line) for line in _events(root, "seed=0") if "resumed" in line]
    assert all(event["lost_steps"] < 8 for event in resumed)
    third = small.start("sweep", *arguments)
    assert third.communicate(timeout=120)[0].splitlines()[-2:] == output.splitlines()[-2:]
    assert len((root / states.JOURNAL).read_text().splitlines()) == len(events)
    assert sum(event["name"] == "raise_at=3" and event["event"] == "ended" for event in events) == 1
    retry = small.start("sweep", *arguments, "--retry")
    retry.communicate(timeout=120)
    more = [json.loads(line) for line in (root / states.JOURNAL).read_text().splitlines()][len(events) :]
    assert [(event["name"], event["event"]) for event in more] == [("raise_at=3", "started"), ("raise_at=3", "ended")]


def _events(root, name):
    (folder,) = [folder for folder in root.iterdir() if folder.name.startswith(name)]
    return (folder / "events.jsonl").read_text().splitlines()


# ---- the queue, with processes that do next to nothing -----------------------------------------------------------


def queue(tmp_path, code, count=3, **options):
    """A queue of `count` runs that each do `code` in their folder, which is `here`."""
    found = members(_tree(), [{"train.seed": seed} for seed in range(count)])
    script = f"import os, sys, time, pathlib; here = pathlib.Path(sys.argv[1]); seed = int(sys.argv[2]); {code}"
    return local.Local(
        found,
        tmp_path,
        lambda m: [sys.executable, "-c", script, str(tmp_path / m.folder), str(m.overrides["train.seed"])],
        **options,
    )


def _tree():
    from moejax import config

    return config.default()


DONE = """(here / "metrics.jsonl").write_text('{"step": 2000, "heldout/bits_per_byte": 1.0}\\n')"""


def test_a_failing_run_is_marked_and_the_others_go_on(tmp_path):
    found = queue(tmp_path, f"{DONE} if seed != 1 else sys.exit(3)", at_once=2).run(lambda states: None)
    kinds = {state.text for state in found.values()}
    assert kinds == {"done", "failed, exit code 3"}
    assert not queue(tmp_path, DONE).queue
    assert len(queue(tmp_path, DONE, retry=True).queue) == 1


def test_one_that_was_preempted_alone_goes_on(tmp_path):
    code = f"""seen = here / "seen"; fresh = not seen.exists(); seen.touch(); sys.exit(75) if fresh else {DONE}"""
    found = queue(tmp_path, code, count=2).run(lambda states: None)
    assert {state.kind for state in found.values()} == {"done"}
    names = [json.loads(line)["event"] for line in (tmp_path / states.JOURNAL).read_text().splitlines()]
    assert names.count("started") == 4


def test_environment_and_processors_of_a_slot(tmp_path):
    """{slot} is the slot's number; two slots share the processors."""
    code = f"""(here / "slot").write_text(os.environ["CARD"] + " " + str(len(os.sched_getaffinity(0)))); time.sleep(0.6); {DONE}"""
    queue(tmp_path, code, count=2, at_once=2, environment={"CARD": "gpu{slot}"}).run(lambda states: None)
    said = sorted(file.read_text() for file in tmp_path.glob("*/slot"))
    cores = len(os.sched_getaffinity(0))
    assert said == [f"gpu{slot} {max(len(range(slot, cores, 2)), 1)}" for slot in (0, 1)]


def test_a_run_that_another_process_holds_waits(tmp_path):
    """Left over from a sweep that was killed where a death is not told: it is not started twice."""
    found = queue(tmp_path, DONE, count=1)
    folder = tmp_path / found.members[0].folder
    folder.mkdir()
    hold = f"from pathlib import Path; from moejax.train.lease import Lease; import time; Lease(Path({str(folder)!r})); time.sleep(2)"
    with subprocess.Popen([sys.executable, "-c", hold]) as holder:
        while not (folder / "lease.json").exists():
            time.sleep(0.05)
        assert states.of(tmp_path, found.members)[found.members[0].id].kind == "running"
        assert found._fill() == 0
        holder.wait()
    assert found._fill() == 1
    found.run(lambda states: None)


def test_a_child_whose_parent_is_gone_does_not_begin(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "moejax.sweep.child", "1", "0", "1", sys.executable, "-c", "print('ran')"],
        capture_output=True,
    )
    assert (done.returncode, done.stdout) == (75, b"")


# ---- results ------------------------------------------------------------------------------------------------------


def row(seed, bits, experts=4):
    overrides = {"model.moe.num_experts": experts, "train.seed": seed, "data.seed": seed}
    return {"name": f"seed={seed}", "overrides": overrides, "numbers": {"heldout/bits_per_byte": bits} if bits else {}}


def test_seeds_are_taken_together():
    """Mean and sample deviation by hand; a run that has not ended counts as one of so many."""
    four, eight = results.settings([row(0, 1.0), row(1, 1.5), row(2, None), row(0, 2.0, experts=8)])
    assert (four["name"], four["runs"], four["of"]) == ("num_experts=4", 2, 3)
    assert four["mean"]["heldout/bits_per_byte"] == 1.25
    assert four["deviation"]["heldout/bits_per_byte"] == pytest.approx(0.125**0.5)
    assert (eight["runs"], eight["deviation"]["heldout/bits_per_byte"]) == (1, None)
    text = results.text([four, eight])
    assert "1.2500 ± 0.3536" in text and "2/3" in text


def test_picture_of_a_sweep():
    found = results.settings([row(0, 1.0), row(1, 1.5), row(0, 2.0, experts=64)])
    assert picture.lines(found, "model.moe.num_experts", "heldout/bits_per_byte", None) == {
        "": [(4.0, [1.0, 1.5]), (64.0, [2.0])]
    }
    assert picture.png(found, "model.moe.num_experts", "heldout/bits_per_byte").startswith(b"\x89PNG")
    with pytest.raises(UserError, match="sets train.steps and has heldout/loss; numbers: heldout/bits_per_byte"):
        picture.lines(found, "train.steps", "heldout/loss", None)


def test_states_have_a_text():
    assert State("failed", 3, 10, 3).text == "failed, exit code 3"
    assert State("waiting", 0, 10).text == "waiting"
