"""What befalls one of two processes: both leave, soon and with the reason, and the same command goes on (B22, B27, B28, B29)."""

import signal
import time

import pytest
from hosts import faults
from train import small

pytestmark = pytest.mark.slow
SECONDS = 30
"""In which the other process must have left; most leave at once."""
KILLS = 2


def stopped(text, work):
    """SIGTERM to the second process alone."""
    processes = faults.start(text, work)
    until = time.monotonic() + 100
    while faults.steps(work) < 6 and time.monotonic() < until and processes[0].poll() is None:
        time.sleep(0.005)
    processes[1].send_signal(signal.SIGTERM)
    return faults.finish(processes), faults.run(text, work)


def killed(text, work):
    """After an undisturbed run of the same programs, which are compiled then."""
    longer = {"train.steps": 150, "checkpoint.every": 5}
    whole = faults.run(text, work.with_name("whole"), **longer)
    return *faults.killed_often(text, work, KILLS, **longer), whole


FAULTS = {
    "die": {"faults.die_at": 10, "faults.process": 1},
    "raise": {"faults.raise_at": 10, "faults.process": 1},
    "raise in the first": {"faults.raise_at": 10, "faults.process": 0},
    "hang": {"faults.hang_at": 10, "faults.process": 1, "watchdog.step": 15},
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folder, and what the processes of each run printed; one run at a time, for each is two processes."""
    tmp = tmp_path_factory.mktemp("hosts")
    text = small.prepared(tmp / "text")
    found = {"one": faults.run(text, tmp / "one")}
    assert [code for code, *_ in found["one"]] == [0, 0], found["one"]
    found |= {name: faults.run(text, tmp / name, **options) for name, options in FAULTS.items()}
    found["different"] = faults.run(text, tmp / "different", {"train.seed": 3})
    return tmp, found | {story.__name__: story(text, tmp / story.__name__) for story in (stopped, killed)}


@pytest.mark.parametrize("name", ["die", "raise", "raise in the first", "hang"])
def test_b28_one_takes_the_other_down(runs, name):
    """Neither stays; what happened is in the output of one of them; the last checkpoint is whole."""
    tmp, found = runs
    codes = [code for code, *_ in found[name]]
    assert "hung" not in codes and 0 not in codes, found[name]
    assert max(seconds for *_, seconds in found[name]) < SECONDS
    said = "".join(err for _, _, err, _ in found[name])
    wanted = {"die": "JaxRuntimeError", "hang": "step has not moved for 15 s"}.get(name, "config.faults.raise_at=10")
    assert wanted in said, said[-2000:]
    code, out, err = small.finish(small.start("verify", str(tmp / name / "checkpoints")))
    assert code == 0 and "whole" in out, (out, err)


def test_b29_other_code_or_config(runs):
    """Both are refused at step 0, with what differs and where."""
    tmp, found = runs
    for code, _, err, _ in found["different"]:
        assert code == 2 and "processes [1] differ from process 0 in: config" in err
    assert not (tmp / "different").exists()


def test_b27_sigterm_to_one(runs):
    """Both save the same step and end with 75; the same command goes on to the end of the undisturbed run."""
    tmp, found = runs
    first, again = found["stopped"]
    assert [code for code, *_ in first] == [75, 75], first
    notes = {err.strip().splitlines()[-1] for _, _, err, _ in first}
    assert len(notes) == 1 and "stopped and saved at step" in notes.pop()
    assert [code for code, *_ in again] == [0, 0], again
    assert (tmp / "stopped" / "metrics.jsonl").read_bytes() == (tmp / "one" / "metrics.jsonl").read_bytes()
    assert faults.digests(tmp / "stopped", 24) == faults.digests(tmp / "one", 24)


def test_b22_killed_at_random(runs):
    """kill -9 twice; in the end metrics and every array are those of the undisturbed run, bit for bit."""
    tmp, found = runs
    rows, last, whole = found["killed"]
    assert len(rows) == KILLS and [code for code, *_ in last] == [0, 0], last
    assert [code for code, *_ in whole] == [0, 0], whole
    assert (tmp / "killed" / "metrics.jsonl").read_bytes() == (tmp / "whole" / "metrics.jsonl").read_bytes()
    assert faults.digests(tmp / "killed", 150) == faults.digests(tmp / "whole", 150)
    assert any(line["event"] == "resumed" for line in faults.events(tmp / "killed"))
