"""Routing over training, read off files written by hand; where a probe's tokens went; configs beside the default; a watched page."""

import json
import threading
import time

import numpy as np
import pytest
from report.test_report import command, write_run  # noqa: F401 (a fixture)

from moejax.data.tokenizer import BYTES
from moejax.errors import DamagedError
from moejax.report import history, layers, page, routing, runs, settings, spent, tokens, watched

LOAD = np.array([[[4, 0], [2, 2]], [[3, 1], [2, 2]], [[2, 2], [0, 4]]])
"""Three times, two layers, two experts."""


@pytest.fixture
def run(tmp_path):
    """A run with three files of routing and a probe: two rows of four tokens, the last of the second row invalid."""
    folder = write_run(tmp_path / "run", "run", bits=2.0, seconds=0.5)
    for step, load in zip((10, 20, 30), LOAD, strict=True):
        whole = load.sum(axis=1)
        sums = {"load": load, "tokens": whole, "requested": 2 * whole, "entropy": 0.5 * whole, "dropped": whole // 2}
        np.savez(folder / "routing" / f"{step:08d}.npz", **{f"sparse.{k}": v for k, v in sums.items()})
    rows, positions = np.indices((2, 4), np.int32).reshape(2, -1)
    facts = {
        "tokens": np.frombuffer(b"ab<\n cd ", np.uint8).astype(np.int32),
        "labels": rows,
        "rows": rows,
        "positions": positions,
    }
    order = np.array([4, 0, 5, 1, 6, 2, 7, 3])  # as groups of several rows have them
    experts = np.array([[[0, 1], [0, 2], [1, 2], [1, 0], [3, 0], [3, 1], [3, 2], [-1, -1]]])
    valid = np.arange(8) < 7
    probe = {k: v[order] for k, v in facts.items()} | {
        "experts": experts[:, order].astype(np.int32),
        "valid": valid[order],
    }
    np.savez(folder / "routing" / "probe_00000030.npz", **probe)
    return runs.load(folder)


def test_shares_over_training_by_hand(run):
    found = history.read(run.path)["sparse"]
    assert found.step.tolist() == [10, 20, 30]
    np.testing.assert_array_equal(found.fair[:, 0], [[2, 0], [1.5, 0.5], [1, 1]])
    health = found.health()
    np.testing.assert_array_equal(health["dead experts"], [[1, 0], [0, 0], [0, 1]])
    np.testing.assert_array_equal(health["largest load [fair shares]"], [[2, 1], [1.5, 1], [1, 2]])
    assert (health["router entropy [nats]"] == 0.5).all()
    assert (health["dropped [% of requests]"] == 25).all()
    assert "rerouted [% of requests]" not in health


def test_layers_that_are_shown():
    """All of a shallow model; of a deep one the first, the last, and others at even distances."""
    assert layers.chosen(5) == [0, 1, 2, 3, 4]
    assert layers.chosen(48, 3) == [0, 24, 47]
    found = layers.chosen(48)
    assert (len(found), found[0], found[-1]) == (12, 0, 47)


def test_a_probe_comes_in_the_order_of_its_text(run):
    probe = history.probe(run.path)
    assert bytes(probe.tokens.astype(np.uint8)) == b"ab<\n cd"
    assert probe.rows.tolist() == [0, 0, 0, 0, 1, 1, 1]
    assert probe.experts[0, :, 0].tolist() == [0, 0, 1, 1, 3, 3, 3]


def test_tables_of_a_probe(run):
    """Requests by position: two rows of four, of which each position is a bin."""
    probe = history.probe(run.path)
    titles, (table,) = tokens.by_position(probe, 4)
    assert titles == [f"position {i}-{i}" for i in range(4)]
    np.testing.assert_array_equal(table, [[2, 1, 0, 1], [1, 1, 1, 1], [0, 1, 2, 1], [1, 1, 0, 0]])


def test_tables_by_class(run):
    """Of the bytes of the probe: four small letters, a bracket, a line's end and a space."""
    titles, (table,) = tokens.by_class(history.probe(run.path), BYTES)
    assert titles == ["lower", "space", "operator"]
    np.testing.assert_array_equal(table, [[2, 2, 2, 2], [2, 1, 0, 1], [0, 1, 1, 0]])


def test_text_is_coloured_by_the_first_expert(run):
    """The commonest expert has the first colour; white space has a mark, mark-up is escaped, rows are apart."""
    text = tokens.text(history.probe(run.path), "sparse", lambda token: bytes([token]).decode())
    assert '<span class="e0">expert 3</span> <span class="e1">expert 0</span> <span class="e2">expert 1</span>' in text
    assert '<span class="e1" title="0, 1">a</span>' in text
    assert '<span class="e2" title="1, 2">&lt;</span>' in text
    assert '<span class="e0" title="3, 0">\u00b7</span>' in text
    assert text.count('<i class="row">') == 2


def test_a_probe_of_an_older_version_is_left_out(run):
    file = run.path / "routing" / "probe_00000030.npz"
    np.savez(file, experts=np.zeros((1, 3, 2), np.int32), valid=np.ones(3, bool))
    assert history.probe(run.path) is None
    assert "coloured" not in "".join(routing.sections([run]))
    file.write_bytes(b"PK")
    with pytest.raises(DamagedError, match="probe_00000030.npz cannot be read"):
        history.probe(run.path)


def test_the_page_shows_them(run):
    text = page.html([run])
    for wanted in (
        "Load over training",
        "Health over training",
        "Which experts take which positions",
        "coloured by expert",
        "Watched",
    ):
        assert wanted in text
    assert 'http-equiv="refresh"' not in text
    assert '<meta http-equiv="refresh" content="7">' in page.html([run], refresh=7)


def test_what_is_quiet_is_said(run):
    assert "experts long unfed, all layers" not in watched.quiet([run])
    assert watched.charts([run]).count("dropped [% of requests]") == 1
    silent = runs.load(write_run(run.path.parent / "dense", "dense", bits=2.0, seconds=0.1, sparse=False))
    assert watched.charts([silent]) == "" and spent.memory([silent]) == "" and spent.sections([silent]) == ""


def test_configs_beside_the_default(run):
    """What two runs differ in, and what both have that is not the default; what a run's config lacks has its default."""
    other = write_run(run.path.parent / "other", "other", bits=2.0, seconds=0.1)
    tree = json.loads((other / "config.json").read_text()) | {"mesh": {"expert": 2}}
    (other / "config.json").write_text(json.dumps(tree))
    between, together = settings.differing([run, runs.load(other)])
    assert ["mesh.expert", "1", "1", "2"] in between
    assert [line[0] for line in between] == ["name", "model.pattern", "mesh.expert"]
    assert ["train.steps", "2000", "40", "40"] in together
    assert not any(line[0] == "mesh.data" for line in [*between, *together])


def test_watching_ends_with_the_run(command, tmp_path):  # noqa: F811
    """The page is made again while the run goes on, and a last time when it has ended; that one does not ask to be loaded again."""
    folder = write_run(tmp_path / "run", "run", bits=2.0, seconds=0.5, finished=False)
    logged = (folder / "metrics.jsonl").read_text()
    (folder / "metrics.jsonl").write_text("")
    pages = []

    def end():
        time.sleep(0.5)
        (folder / "metrics.jsonl").write_text(logged)
        while not (folder / "report.html").exists():
            time.sleep(0.05)
        pages.append((folder / "report.html").read_text())
        with open(folder / "metrics.jsonl", "a") as out:
            out.write(json.dumps({"step": 40, "train/bits_per_byte": 1.0}) + "\n")
            out.write(json.dumps({"step": 40, "heldout/bits_per_byte": 1.5}) + "\n")

    thread = threading.Thread(target=end)
    thread.start()
    code, output, _ = command(f"--workdir={folder}", "--watch=1")
    thread.join()
    assert code == 0
    assert 'content="1"' in pages[0] and "unfinished" in pages[0]
    last = (folder / "report.html").read_text()
    assert "refresh" not in last and "unfinished" not in last
    assert output.startswith(f"workdir {folder} has logged no step") and "1.5000" in output
