"""The health table of a report: planted alarms, duplicates and ties are named; what a run lacks is a dash."""

import json

import numpy as np
from report.test_report import TABLES, write_run

from moejax.report import health, page, runs, table


def test_lines_of_a_run_that_holds_little(tmp_path):
    """Layer 0 is even and tied to labels; in layer 1 expert 3 is dead. No probes, no entropy."""
    run = runs.load(write_run(tmp_path / "run", "sparse", bits=2.0, seconds=0.1))
    first, second = health.lines(run)
    assert first[0] == "sparse\u00a00"
    even, dead = TABLES[0].sum(axis=0), TABLES[1].sum(axis=0)
    assert first[1] == f"{4 * even.max() / even.sum() - 1:.2f}"
    assert (first[4], second[4]) == ("0", "1")
    assert second[1] == f"{4 * dead.max() / dead.sum() - 1:.2f}"
    assert (first[7], second[7]) == ("1.000", "0.000")
    assert first[5] == first[6] == first[8] == "–"


def test_probes_give_saturation(tmp_path):
    """Two layers; at the last evaluation layer 0 chooses as at the first, layer 1 shares one of two experts."""
    folder = write_run(tmp_path / "run", "sparse", bits=2.0, seconds=0.1)
    valid = np.array([True, True, False])
    early = np.array([[[0, 1], [2, 3], [0, 1]], [[0, 1], [0, 1], [0, 1]]])
    late = np.array([[[1, 0], [3, 2], [3, 3]], [[0, 2], [1, 3], [0, 1]]])
    for step, experts in ((20, early), (40, late)):
        np.savez(folder / "routing" / f"probe_{step:08d}.npz", experts=experts, valid=valid)
    rows = health.lines(runs.load(folder))
    assert [row[8] for row in rows] == ["1.000", "0.500"]


def test_what_was_noticed_is_named(tmp_path):
    """An alarm of the run, experts 0 and 1 of layer 1 that always come together, and who takes which label."""
    folder = write_run(tmp_path / "run", "sparse", bits=2.0, seconds=0.1)
    together = np.diag([90, 90, 40, 40])
    together[0, 1] = together[1, 0] = 88
    load = np.array([[65, 65, 65, 65], [90, 90, 40, 40]])
    file = folder / "routing" / "heldout.npz"
    coactivation = np.stack([np.diag([65, 65, 65, 65]), together])
    np.savez(file, **{"sparse.labels": 10 * TABLES, "sparse.load": load, "sparse.coactivation": coactivation})
    with open(folder / "events.jsonl", "a") as out:
        out.write('{"event": "collapse", "step": 40, "alarm": "collapse: sparse layer 1, expert 3 below <0.1>"}\n')
    run = runs.load(folder)
    notes = health.notes(run)
    assert notes[0] == "collapse: sparse layer 1, expert 3 below <0.1>"
    assert any("layer 1: experts 0 and 1" in note and "duplicates" in note for note in notes)
    assert sum("duplicates" in note for note in notes) == 1
    assert any("layer 0: code to expert 0 (75%), prose & <verse> to expert" in note for note in notes)
    html = page.html([run])
    assert "below &lt;0.1&gt;" in html
    assert all(name in html for name in health.HEAD)


def test_a_known_entropy_stands_beside_the_loss(tmp_path):
    folders = [write_run(tmp_path / name, name, bits=bits, seconds=0.1) for name, bits in (("one", 2.5), ("two", 3.0))]
    for folder in folders:
        facts = json.loads((folder / "run.json").read_text()) | {"heldout_floor": 2.25}
        (folder / "run.json").write_text(json.dumps(facts))
    sparse, dense = table.numbers(runs.load_all(folders))["runs"]
    assert (sparse["floor"], sparse["above_floor"], dense["above_floor"]) == (2.25, 0.25, 0.75)
