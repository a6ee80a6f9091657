"""A dense model, upcycled and trained on, against the same model trained on densely: one run after another, numbers and a picture."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moejax.errors import UserError
from moejax.report import runs
from moejax.report.runs import Run

SCRIPTS = Path(__file__).parents[2] / "scripts"
BRANCHES = {"dense": "restart", "granular": "upcycle", "copies": "upcycle"}
"""Variants of the experiment file that begin from the base, each with the surgery that makes its start."""
CURVE, BITS = "eval/bits_per_byte", "heldout/bits_per_byte"


def train(file: str, folder: Path, seeds: Sequence[int], overrides: Sequence[str]) -> tuple[Run, dict[int, list[Run]]]:
    """Trains the base, and from it every branch once a seed; returns the runs. What is finished is not repeated.

    A seed is that of a fresh router and of the order of rows, which is another than the base has seen.
    """
    base = _trained(f"{file}:base", folder / "base", overrides)
    found = {}
    for seed in seeds:
        own = (f"--config.train.seed={seed}", f"--config.data.seed={seed + 1}", *overrides)
        found[seed] = [
            _branch(f"{file}:{name}", folder / f"seed{seed}" / name, base, BRANCHES[name], own) for name in BRANCHES
        ]
    return base, found


def _branch(file: str, workdir: Path, base: Run, operation: str, overrides: Sequence[str]) -> Run:
    """A run that begins from the base, changed by a surgery."""
    if not (workdir / "config.json").exists():
        _call(
            "surgery",
            f"--operation={operation}",
            f"--from={base.path}",
            f"--config={file}",
            f"--workdir={workdir}",
            *overrides,
        )
    return _trained(file, workdir, overrides)


def _trained(file: str, workdir: Path, overrides: Sequence[str]) -> Run:
    if not (workdir / "metrics.jsonl").exists() or not runs.load(workdir).finished:
        _call("train", f"--config={file}", f"--workdir={workdir}", *overrides)
    return runs.load(workdir)


def _call(script: str, *arguments: str) -> None:
    code = subprocess.run([sys.executable, str(SCRIPTS / f"{script}.py"), *arguments], env=os.environ).returncode
    if code:
        error = UserError(
            f"scripts/{script}.py {' '.join(arguments)} ended with exit code {code}; its message stands above"
        )
        error.exit_code = code if code > 0 else 1
        raise error


def flops(run: Run) -> float:
    """Of one step: 6 a token and active parameter."""
    data = run.config["data"]
    return 6.0 * run.facts["parameters"]["active"] * data["batch"] * data["context"]


def numbers(base: Run, seeds: Mapping[int, Sequence[Run]]) -> dict[str, Any]:
    """What each branch of each seed came to, with what compute, and from where on the sparse ones are ahead of the dense one."""
    return {
        "base": {"steps": base.steps, "bits_per_byte": base.heldout[BITS]},
        "seeds": {seed: {run.name: _row(run, branches[0]) for run in branches} for seed, branches in seeds.items()},
    }


def _row(run: Run, dense: Run) -> dict[str, Any]:
    return {
        "steps": run.steps,
        "parameters": run.facts["parameters"],
        "flops": run.steps * flops(run),
        "bits_per_byte": run.heldout[BITS],
        "gain_over_dense": dense.heldout[BITS] - run.heldout[BITS],
        "ahead_from_flops": None if run is dense else _ahead(run, dense),
        "curve": [[int(s), float(v)] for s, v in zip(*run.curves[CURVE], strict=True)],
    }


def _ahead(run: Run, dense: Run) -> float | None:
    """FLOPs of the first evaluation from which on every one is below the dense model's at as much compute; None if there is none."""
    curve, other = run.curves[CURVE], dense.curves[CURVE]
    cost = curve.step * flops(run)
    behind = np.flatnonzero(curve.value >= np.interp(cost, other.step * flops(dense), other.value))
    first = behind[-1] + 1 if len(behind) else 0
    return float(cost[first]) if first < len(cost) else None


def table(result: dict[str, Any]) -> str:
    """The same for a person."""
    base = result["base"]
    lines = [
        f"base: {base['bits_per_byte']:.4f} bits per byte after {base['steps']} steps; trained on:",
        f"{'':10}{'seed':>5}{'steps':>7}{'total':>11}{'active':>10}{'GFLOP':>10}{'bits/byte':>11}{'gain':>9}  ahead from",
    ]
    for seed, branches in result["seeds"].items():
        for name, row in branches.items():
            ahead = row["ahead_from_flops"]
            said = "" if name == "dense" else "never" if ahead is None else f"{ahead / 1e9:,.0f} GFLOP"
            lines.append(
                f"{name:10}{seed:>5}{row['steps']:>7}{row['parameters']['total']:>11,}{row['parameters']['active']:>10,}"
                f"{row['flops'] / 1e9:>10,.0f}{row['bits_per_byte']:>11.4f}{row['gain_over_dense']:>+9.4f}  {said}"
            )
    return "\n".join(lines)


def draw(base: Run, seeds: Mapping[int, Sequence[Run]]) -> bytes:
    """Held-out bits per byte of every branch by compute after the base, as PNG; the dotted line is where they begin."""
    from moejax.report import figures  # matplotlib is an extra, and the numbers do not need it

    with figures.drawing(6.5, 3.6) as (figure, axes):
        for nth, branches in enumerate(seeds.values()):
            for i, run in enumerate(branches):
                curve, style = run.curves[CURVE], figures.style_of(i)
                axes.plot(
                    curve.step * flops(run) / 1e9, curve.value, **style, marker="o", markersize=3,
                    linewidth=1.6 / (1 + nth), label="" if nth else run.name,
                )  # fmt: skip
        start = base.curves[CURVE].value[-1]
        axes.axhline(start, color=figures.INK, linewidth=0.8, linestyle=":", label="base, last evaluation")
        axes.set(xlabel="GFLOP after the base", ylabel="bits per byte, held-out part")
        axes.grid(True)
        axes.legend()
        return figures.png(figure)
