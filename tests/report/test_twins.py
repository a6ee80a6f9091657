"""The comparison of a sparse model with its dense twin, as a user starts it, and its summary over seeds."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from moejax.report import runs, twins

ROOT = Path(__file__).parents[2]
SMALL = {
    "data.batch": 2, "data.context": 16, "train.steps": 24, "train.warmup": 2, "train.log_every": 2, "train.eval_every": 12,
    "train.eval_rows": 4, "checkpoint.every": 12, "model.repeats": 1, "model.unroll": 1, "model.width": 16,
    "model.moe.num_experts": 4, "model.moe.hidden": 8, "model.hidden": 16, "data.source": "files", "data.heldout": 0.3,
}  # fmt: skip


def run(bits, seconds):
    """A finished run with these held-out bits per byte and seconds a step."""
    clock = runs.Curve(np.zeros(0, np.int64), np.zeros(0))
    return runs.Run(Path(), "run", {}, {}, {}, {"heldout/bits_per_byte": bits}, clock, seconds, {}, "", [])


def test_summary_over_seeds():
    """Gains are twin less sparse; mean and sample deviation by hand."""
    bits = [(1.0, 1.1, 1.05), (1.0, 1.3, 1.0)]
    comparisons = [[run(b, s) for b, s in zip(of_seed, (3.0, 2.0, 2.0), strict=True)] for of_seed in bits]
    found = twins.summary(comparisons)
    assert found["step_time_ratio"] == [1.5, 1.5]
    assert found["gain"]["equal steps"]["mean"] == pytest.approx(0.2)
    assert found["gain"]["equal steps"]["deviation"] == pytest.approx(0.1 * 2**0.5)
    assert found["gain"]["equal time"]["each"] == pytest.approx([0.05, 0.0])
    text = twins.summary_text(comparisons)
    assert "+0.2000" in text
    assert "1.50x" in text


@pytest.mark.slow
def test_compare_from_the_command_line(tmp_path):
    """Three runs, one table, one page; the twin at equal time has at least as many steps; a second call repeats nothing."""
    for i in range(8):
        (tmp_path / f"{i}.txt").write_text(f"{i} letters make a word and words make a line\n" * (3 + i))
    options = [f"--config.{key}={value}" for key, value in SMALL.items()]
    options += [f"--config.data.files={tmp_path}/*.txt", f"--config.data.cache={tmp_path}/cache"]
    command = [sys.executable, "scripts/compare.py", f"--workdir={tmp_path}/runs", *options]
    first = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert first.returncode == 0, first.stderr
    assert "held-out bits per byte" in first.stdout
    assert (tmp_path / "runs" / "report.html").read_text().count("<svg") >= 4
    longer = json.loads((tmp_path / "runs" / "dense_equal_time" / "config.json").read_text())
    assert longer["train"]["steps"] >= SMALL["train.steps"]
    assert longer["model"]["pattern"] == ["attention+dense"]
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert again.returncode == 0, again.stderr
    assert "  step " not in again.stdout
    bits = [line.split()[4:7] for line in again.stdout.splitlines() if line.startswith("held-out bits per byte")]
    assert bits == [
        line.split()[4:7] for line in first.stdout.splitlines() if line.startswith("held-out bits per byte")
    ]
