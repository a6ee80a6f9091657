"""A small sweep, written for every scheduler on one host a run and on two: tests/golden/specs has what comes out.

PYTHONPATH=.:tests python tests/sweep/specs.py     writes it anew
"""

import shutil
from pathlib import Path

from moejax import config
from moejax.sweep import engines, spec
from moejax.sweep.members import members
from moejax.sweep.plan import Plan

FOLDER = Path(__file__).parents[1] / "golden" / "specs"
GRID = (
    {"train.seed": 0},
    {"train.seed": 1, "model.pattern": ("attention+dense",)},
    {"train.seed": 2, "data.files": 'a b\'s/$(HOME) "$x".md'},
)
COMMON = ("--config.train.log_every=10",)
ENV = {"XLA_FLAGS": "--a=$(b) --c"}
POD = {"image": "example.org/moejax:1", "queue": "team", "claim": "shared"}
CASES = {
    "slurm_1": ("slurm", {"time": "04:00:00", "at_once": "2", "gpus": "a100:8", "cpus": "16", "partition": "main"}),
    "slurm_2": (
        "slurm",
        {"time": "1-00:00:00", "nodes": "2", "folder": "/home/me/moe jax", "setup": "module load cuda"},
    ),
    "skypilot_1": ("skypilot", {"bucket": "gs://results", "accelerators": "tpu-v5p-8", "spot": "true", "infra": "gcp"}),
    "skypilot_2": ("skypilot", {"volume": "results", "accelerators": "H100:8", "nodes": "2", "cpus": "16+"}),
    "jobset_1": ("jobset", {**POD, "gpu": "nvidia-h100-80gb", "gpus": "8", "memory": "64Gi", "spot": "true"}),
    "jobset_2": ("jobset", {**POD, "tpu": "tpu-v5p-slice", "topology": "2x2x2", "nodes": "2", "name": "slices"}),
}
"""Scheduler and --set of each folder."""


def plan():
    found = members(config.default(), list(GRID))
    return Plan("small_sweep", "tests/sweep/default.py", COMMON, tuple(found), "/runs/small sweep")


def options(case, **other):
    """Of one case, or with other values; None takes one out."""
    engine, settings = CASES[case]
    pairs = [f"{key}={value}" for key, value in (settings | other).items() if value is not None]
    return spec.read(engines.ENGINES[engine].options, pairs, ENV)


def files(case, **other):
    """Text by name."""
    return engines.ENGINES[CASES[case][0]].files(plan(), options(case, **other))


def main():
    shutil.rmtree(FOLDER, ignore_errors=True)
    for case, (engine, settings) in CASES.items():
        engines.write(plan(), engine, [f"{key}={value}" for key, value in settings.items()], ENV, FOLDER / case)


if __name__ == "__main__":
    main()
