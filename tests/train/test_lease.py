"""One run a workdir: leases, without a clock."""

import json
import os
import time

import pytest

from moejax.errors import UserError
from moejax.train import lease, sections
from moejax.train.lease import Lease
from moejax.train.sections import Sections


@pytest.fixture(autouse=True)
def no_clock(monkeypatch):
    """Clocks that jump change nothing, because nobody looks at them."""

    def jump():
        raise AssertionError("wall-clock time was read")

    monkeypatch.setattr(time, "time", jump)


def test_held_and_released(tmp_path):
    first = Lease(tmp_path, beat=0.01)
    with pytest.raises(UserError, match=rf"belongs to a run that is alive \(process {os.getpid()} on "):
        Lease(tmp_path, beat=0.01)
    first.release()
    assert not list(tmp_path.iterdir())
    second = Lease(tmp_path, beat=0.01)
    assert second.taken_from is None
    second.release()


def held_by(tmp_path, **fields):
    (tmp_path / lease.FILE).write_text(json.dumps({"token": "other", "count": 3, **lease._self(), **fields}))


def test_a_dead_process_of_this_machine(tmp_path):
    """Its number is nobody's, or somebody else's now: taken over at once."""
    for fields in ({"process": 2**22 + 1}, {"started": "1"}):
        held_by(tmp_path, **fields)
        mine = Lease(tmp_path, beat=0.01, patience=30.0)
        assert mine.taken_from["token"] == "other"
        mine.release()


def test_another_machine_is_watched(tmp_path):
    """One whose count stands still is dead after the patience; one that counts on is alive."""
    held_by(tmp_path, host="elsewhere")
    mine = Lease(tmp_path, beat=0.01, patience=0.3)
    assert mine.taken_from["host"] == "elsewhere"
    mine.release()
    alive = Lease(tmp_path, beat=0.01)
    alive._mine["host"] = "elsewhere"
    until = time.monotonic() + 5
    while json.loads((tmp_path / lease.FILE).read_text())["host"] != "elsewhere" and time.monotonic() < until:
        time.sleep(0.01)
    with pytest.raises(UserError, match="alive .* on elsewhere"):
        Lease(tmp_path, beat=0.01, patience=5.0)
    alive.release()


def test_a_lease_that_was_taken(tmp_path):
    """The run that was thought dead sees it, writes no more and leaves the other's lease."""
    first = Lease(tmp_path, beat=0.01)
    held_by(tmp_path)
    assert first.lost()
    first.release()
    assert json.loads((tmp_path / lease.FILE).read_text())["token"] == "other"


def test_a_lease_cut_short_is_none(tmp_path):
    (tmp_path / lease.FILE).write_text('{"tok')
    Lease(tmp_path, beat=0.01).release()


def test_sections_add_up(tmp_path, monkeypatch):
    """An inner section's time is not its outer one's; nothing is limited that has no limit."""
    clock = [0.0]
    monkeypatch.setattr(sections.time, "monotonic", lambda: clock[0])
    found = Sections({"step": 0.0}, tmp_path / "stacks.txt")

    def passes(seconds):
        clock[0] += seconds

    with found.of("init"):
        passes(1)
        with found.of("compile"):
            passes(10)
        passes(2)
    with found.of("step"):
        passes(100)
        found.beat()
        passes(1000)
    found.close()
    assert found.seconds == dict.fromkeys(sections.NAMES, 0.0) | {"init": 3.0, "compile": 10.0, "step": 1100.0}
    assert not (tmp_path / "stacks.txt").exists()
