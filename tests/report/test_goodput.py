"""The ledger of a run that was started three times, read back."""

import pytest

from moejax.report import goodput

EVENTS = [
    {"event": "ledger", "step": 5, "seconds": {"init": 1.0, "step": 2.0}},
    {"event": "ledger", "step": 10, "seconds": {"init": 1.0, "step": 6.0}},
    {"event": "resumed", "step": 10, "lost_steps": 4, "time": 1.5},
    {"event": "ledger", "step": 15, "seconds": {"init": 1.0, "step": 1.0, "save": 1.0}},
    {"event": "rolled back", "spike": 18, "to": 15},
    {"event": "ledger", "step": 20, "seconds": {"init": 1.0, "step": 3.0, "save": 2.0}},
    {"event": "resumed", "step": 20, "lost_steps": 0},
    {"event": "ledger", "step": 25, "seconds": {"init": 0.5, "step": 0.5, "save": 0.0}},
]


def test_ledger_of_several_starts():
    """The last line of each process counts."""
    assert goodput.seconds(EVENTS) == {"init": 2.5, "step": 9.5, "save": 2.0}
    assert goodput.share(EVENTS) == pytest.approx(9.5 / 14)
    assert goodput.starts(EVENTS) == 3 and goodput.lost_steps(EVENTS) == 7
    assert goodput.sentence(EVENTS) == "68 % of 14.0 s in steps; init 2.5 s, save 2.0 s; 3 start(s), 7 step(s) lost"
    assert [e["event"] for e in goodput.happened(EVENTS)] == ["resumed", "rolled back", "resumed"]
    assert "time" not in goodput.happened(EVENTS)[0]


def test_a_run_without_a_ledger():
    assert goodput.seconds([]) == {} and goodput.share([]) is None and goodput.sentence([]) == "no ledger"
