"""Reports of workdirs written by hand: the numbers are those of a calculation on paper, the page stands alone."""

import html.parser
import importlib.util
import json
import math
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from absl import flags

from moejax import cli
from moejax.errors import DamagedError, UserError
from moejax.report import page, pictures, runs, specialisation, table

SCRIPT = Path(__file__).parents[2] / "scripts" / "report.py"
LABELS = ["code", "prose & <verse>"]

# Two labels, four experts, two layers. Layer 0 is a perfect tie: each expert takes one label. In layer 1 the experts
# do not look at the label, and expert 3 has nothing.
TABLES = np.array([[[6, 0, 2, 0], [0, 4, 0, 4]], [[2, 4, 2, 0], [2, 4, 2, 0]]])


def write_run(
    path: Path, name: str, *, bits: float, seconds: float, sparse: bool = True, finished: bool = True
) -> Path:
    """A run of 40 steps: logged at 10, 20, 30, 40, evaluated at 20; unfinished, it ends at 30."""
    (path / "routing").mkdir(parents=True)
    config = {"name": name, "train": {"steps": 40}, "data": {"batch": 4, "context": 8}, "model": {"pattern": [name]}}
    run = {"plan": f"plan of {name} · dropless", "parameters": {"total": 5000 if sparse else 1000, "active": 1000}}
    run |= {"labels": LABELS, "data_hash": "abc", "devices": ["cpu", "cpu"], "versions": {"jax": "0.10.2"}}
    routing = [{"moe/requested": r, "moe/drop_rate": d} for r, d in ((100, 0.5), (300, 0.1), (100, 0.0), (100, 0.0))]
    lines = [{"step": 10 * i + 10, "train/bits_per_byte": 5.0 - i} | (routing[i] if sparse else {}) for i in range(4)]
    lines.insert(2, {"step": 20, "eval/bits_per_byte": bits + 1})
    # 10 steps without a time count at the median of the other intervals, which is `seconds`.
    timing = [
        {"step": 10},
        *({"step": s, "seconds_per_step": t} for s, t in ((20, seconds), (30, 2 * seconds), (40, 0.0))),
    ]
    if finished:
        final = {"heldout/bits_per_byte": bits, f"heldout/bits_per_byte/{LABELS[0]}": bits - 1}
        lines.append({"step": 40} | final | ({"heldout/moe/load_max": 2.0, "heldout/moe/dead": 1} if sparse else {}))
    else:
        lines, timing = lines[:4], timing[:3]
    for file, tree in (("config.json", config), ("run.json", run)):
        (path / file).write_text(json.dumps(tree))
    for file, found in (
        ("metrics.jsonl", lines),
        ("timing.jsonl", timing),
        ("events.jsonl", [{"event": "resumed", "step": 20}]),
    ):
        (path / file).write_text("".join(json.dumps(line) + "\n" for line in found))
    if sparse and finished:
        np.savez(path / "routing" / "heldout.npz", **{"sparse.labels": TABLES, "sparse.load": TABLES.sum(axis=1)})
    return path


@pytest.fixture
def pair(tmp_path):
    """A sparse run and its dense twin."""
    sparse = write_run(tmp_path / "sparse", "sparse", bits=2.5, seconds=0.5)
    return [sparse, write_run(tmp_path / "dense", "dense", bits=3.0, seconds=0.25, sparse=False)]


def test_numbers_are_those_of_a_calculation_by_hand(pair):
    numbers = table.numbers(runs.load_all(pair))
    expected = {
        "name": "sparse",
        "workdir": str(pair[0]),
        "finished": True,
        "planned_steps": 40,
        "heldout/bits_per_byte": 2.5,
        "heldout/bits_per_byte/code": 1.5,
        "heldout/moe/load_max": 2.0,
        "heldout/moe/dead": 1,
        "parameters/total": 5000,
        "parameters/active": 1000,
        "steps": 40,
        "tokens": 40 * 4 * 8,
        "milliseconds_per_step": 500.0,
        "training_seconds": 10 * (0.5 + 0.5 + 1.0 + 0.0),
        "drop_rate": (100 * 0.5 + 300 * 0.1) / 600,
    }
    assert numbers["runs"][0] == pytest.approx(expected)
    assert "drop_rate" not in numbers["runs"][1]
    comparison = numbers["comparisons"][0]
    assert comparison["difference"] == {"heldout/bits_per_byte": -0.5, "heldout/bits_per_byte/code": -0.5, "steps": 0}
    assert comparison["ratio"] == pytest.approx(
        {"parameters/total": 5, "parameters/active": 1, "tokens": 1, "milliseconds_per_step": 2, "training_seconds": 2}
    )
    json.dumps(numbers, allow_nan=False)


def test_text_shows_the_same_numbers(pair):
    lines = table.text(runs.load_all(pair)).splitlines()
    assert lines[0].split("  ")[-1] == "sparse vs dense"
    assert ["held-out bits per byte", "2.5000", "3.0000", "-0.5000"] in [re.split(r"\s{2,}", line) for line in lines]
    assert ["step time, median [ms]", "500.0", "250.0", "2.00 x"] in [re.split(r"\s{2,}", line) for line in lines]


def test_seconds_at_a_step_lie_between_the_logged_ones(pair):
    run = runs.load(pair[0])
    np.testing.assert_allclose(run.seconds_at(np.array([0, 5, 20, 25, 40])), [0, 2.5, 10, 15, 20])


class Elements(html.parser.HTMLParser):
    """Names and ids of a page."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.ids = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.ids += [value for name, value in attributes if name == "id"]


def test_page_has_every_picture_and_loads_nothing(pair):
    text = page.html(runs.load_all(pair))
    elements = Elements(text)
    # by step, by time, what was watched, load, a table of labels for each of two layers, step time
    assert elements.tags.count("svg") == 7
    assert len(elements.ids) == len(set(elements.ids))
    assert set(re.findall(r"(\S+)=\"https?://", text)) == {"xmlns", "xmlns:xlink"}
    assert "http" not in re.sub(r'xmlns(:\w+)?="[^"]*"', "", text)
    assert not {"script", "iframe"} & set(elements.tags)
    assert re.findall(r"<link[^>]*>", text) == ['<link rel="icon" href="data:,">']
    assert set(re.findall(r'(?:href|src)="([^"]{5})', text)) <= {"#run0", "data:", "#by-s", "#by-t", "#watc", "#step"}
    for wanted in ("plan of dense · dropless", "sparse vs dense", "model.pattern", "0.10.2", "2 x cpu", "resumed 20"):
        assert wanted in text
    assert LABELS[1] not in text
    assert "prefers-color-scheme: dark" in text
    assert "width=device-width" in text


def test_panels_say_how_much_experts_know_of_labels(pair):
    tied, independent = pictures.label_panels(runs.load(pair[0]), "x")
    assert tied.information == pytest.approx(1)
    assert independent.information == pytest.approx(0, abs=1e-12)
    assert "NMI 1.000" in tied.svg


@pytest.mark.parametrize("shape", [(3, 16), (5, 5), (1, 4), (4, 1)])
def test_information_against_the_definition(shape):
    counts = np.random.default_rng(1).integers(0, 50, shape)
    p = counts / counts.sum()
    rows, columns = p.sum(axis=1), p.sum(axis=0)
    information = sum(p[i, j] * math.log(p[i, j] / (rows[i] * columns[j])) for i, j in np.ndindex(shape) if p[i, j])
    smaller = min(-sum(q * math.log(q) for q in margin if q) for margin in (rows, columns))
    expected = information / smaller if min(shape) > 1 else 0
    assert specialisation.normalized_information(counts) == pytest.approx(expected)


def test_information_of_planted_tables():
    assert specialisation.normalized_information(7 * np.eye(6, dtype=int)) == pytest.approx(1)
    assert specialisation.normalized_information(np.outer([1, 2, 7], [3, 1, 4, 0])) == pytest.approx(0, abs=1e-12)
    assert specialisation.normalized_information(np.zeros((2, 3), int)) == 0


def test_shuffled_table_keeps_labels_and_knows_nothing():
    counts = 10_000 * np.eye(4, dtype=int)
    control = specialisation.shuffled(counts)
    np.testing.assert_array_equal(control.sum(axis=1), counts.sum(axis=1))
    assert specialisation.normalized_information(control) < 0.001
    np.testing.assert_array_equal(specialisation.shuffled(np.zeros((2, 3), int)), np.zeros((2, 3)))


def test_order_puts_experts_of_one_label_side_by_side():
    counts = np.array([[0, 9, 1, 5], [8, 0, 9, 5]])
    # label 0 is rarer: expert 1 is its own, expert 3 leans to it; 0 is all label 1, 2 almost
    assert specialisation.order(counts).tolist() == [1, 3, 0, 2]


def test_unfinished_run_is_reported_as_such(tmp_path):
    run = runs.load(write_run(tmp_path / "run", "half", bits=2.0, seconds=0.5, finished=False))
    text = table.text([run])
    assert "half (unfinished)" in text
    assert "half is unfinished: step 30 of 40" in text
    numbers = table.numbers([run])["runs"][0]
    assert (numbers["finished"], numbers["eval/bits_per_byte"], numbers["steps"]) == (False, 3.0, 30)
    assert page.html([run]).count("<svg") == 4  # by step, by time, drops in training, step time


def test_evaluations_of_different_steps_are_not_compared(pair, tmp_path):
    half = write_run(tmp_path / "run", "half", bits=2.0, seconds=0.5, finished=False)
    found = {row.key: row for row in table.rows(runs.load_all([pair[0], half]))}
    assert found["eval/step"].values == (20, 20)
    assert found["eval/bits_per_byte"].compared(1) == 0.5
    lines = (half / "metrics.jsonl").read_text().replace('"step": 20, "eval', '"step": 15, "eval')
    (half / "metrics.jsonl").write_text(lines)
    found = {row.key: row for row in table.rows(runs.load_all([pair[0], half]))}
    assert found["eval/bits_per_byte"].compared(1) is None


def test_routing_of_an_unfinished_run_is_that_of_its_last_step(tmp_path):
    folder = write_run(tmp_path / "run", "half", bits=2.0, seconds=0.5, finished=False)
    for step in (10, 20):
        np.savez(folder / "routing" / f"{step:08d}.npz", **{"sparse.load": np.full((2, 4), step)})
    run = runs.load(folder)
    assert (run.routing_from, run.routing["sparse"]["load"][0, 0]) == ("step 20", 20)
    # by step, by time, drops, load at the end and over training, health over training, step time
    assert page.html([run]).count("<svg") == 7


def test_runs_of_one_name_are_told_apart(tmp_path):
    folders = [write_run(tmp_path / name, "same", bits=2.0, seconds=0.5) for name in "ab"]
    assert [run.name for run in runs.load_all([*folders, folders[0]])] == [f"same ({folder})" for folder in folders]


def test_errors_say_what_to_change(tmp_path):
    with pytest.raises(UserError, match="does not exist; give the --workdir"):
        runs.load(tmp_path / "missing")
    with pytest.raises(UserError, match=r"is no run: it has no config\.json"):
        runs.load(tmp_path)
    folder = write_run(tmp_path / "run", "run", bits=2.0, seconds=0.5)
    (folder / "routing" / "heldout.npz").write_bytes(b"not a zip")
    with pytest.raises(DamagedError, match=r"heldout\.npz cannot be read"):
        runs.load(folder)
    (folder / "metrics.jsonl").write_text("")
    with pytest.raises(UserError, match="has logged no step of 40 yet"):
        runs.load(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(DamagedError, match=r"config\.json cannot be read as JSON"):
        runs.load(folder)


@pytest.fixture
def command(monkeypatch, capsys):
    """command(argument, ...) -> exit code, output, errors of scripts/report.py, in this process."""
    before = set(flags.FLAGS)
    spec = importlib.util.spec_from_file_location("report_script", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["report.py", *arguments])
        monkeypatch.setattr(sys.modules["__main__"], "__doc__", script.__doc__)
        for name in set(flags.FLAGS) - before:
            flags.FLAGS[name].unparse()
        code = 0
        try:
            cli.run(script.main)
        except SystemExit as stop:
            code = stop.code or 0
        return code, *capsys.readouterr()

    yield run
    for name in set(flags.FLAGS) - before:
        delattr(flags.FLAGS, name)
    flags.FLAGS.unparse_flags()


def test_command_prints_the_table_and_writes_the_page(command, pair, tmp_path):
    workdirs = [f"--workdir={folder}" for folder in pair]
    code, out, _ = command(*workdirs)
    assert (code, out.splitlines()[-1]) == (0, f"the pictures are in {pair[0] / 'report.html'}")
    assert (pair[0] / "report.html").read_text().startswith("<!doctype html>")
    code, out, _ = command(*workdirs, "--json", f"--out={tmp_path / 'new' / 'x.html'}")
    assert (code, json.loads(out)) == (0, table.numbers(runs.load_all(pair)))
    assert (tmp_path / "new" / "x.html").exists()


def test_command_says_in_one_line_what_is_wrong(command, pair, tmp_path, monkeypatch):
    for arguments, message in (
        ([], "--workdir is missing"),
        ([f"--workdir={tmp_path / 'missing'}"], "does not exist"),
        (["--wrokdir=x"], "wrokdir"),
        ([f"--workdir={pair[0]}", f"--out={pair[0] / 'config.json' / 'x.html'}"], "cannot be written"),
    ):
        code, _, errors = command(*arguments)
        assert (code, errors.count("\n")) == (2, 1)
        assert message in errors
    for module in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.setitem(sys.modules, module, None)
    for module in ("page", "pictures", "figures"):
        monkeypatch.delitem(sys.modules, f"moejax.report.{module}")
        monkeypatch.delattr(f"moejax.report.{module}")
    code, out, errors = command(f"--workdir={pair[0]}")
    assert (code, errors) == (2, "error: pictures need matplotlib: pip install moejax[plot]\n")
    assert "held-out bits per byte" in out
    assert command(f"--workdir={pair[0]}", "--json")[0] == 0


def test_help_has_an_example(command):
    code, out, _ = command("--help")
    assert code == 0
    assert "Example: python scripts/report.py --workdir=" in out
