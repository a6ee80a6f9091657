"""Experts at equal active FLOPs: 1 to 64 of them in the default experiment, and its dense twin for up to twice the steps.

python scripts/sweep.py --config=configs/sweeps/experts.py --engine=local --workdir=runs/experts --at_once=2
python scripts/sweep.py --config=configs/sweeps/experts.py --workdir=runs/experts --collect \\
    --x=model.moe.num_experts --picture=experts.png

A token always visits a hidden width of 192: two experts of 96, or the one of 192 where there is one. The dense twin's longer
runs say what the time that a sparse step takes longer would have bought it. Two cores without an accelerator, two runs at a
time: an hour and a half for three seeds. Held-out bits per byte 2.13 with 2 experts, 2.06 with 8, 2.04 with 32, 2.06 with 64; dense 2.15
(docs/experiments.md).
"""

import pathlib

import ml_collections

from moejax.sweep import grid

TINY = str(pathlib.Path(__file__).parents[1] / "tiny.py")

SEEDS = (0, 1, 2)
EXPERTS = (1, 2, 4, 8, 16, 32, 64)
STEPS = (800, 1000, 1200, 1600)
ONE = {"top_k": 1, "hidden": 192, "gate_scale": 1.0, "renormalize": False}
ONE = {f"model.moe.{key}": value for key, value in ONE.items()}
"""A single expert, whose gate is 1."""


def get_config() -> ml_collections.ConfigDict:
    return grid.load(TINY).get_config("sparse")


def sweep(add):
    for seed in SEEDS:
        seeds = {"train.seed": seed, "data.seed": seed}
        for experts in EXPERTS:
            add({"model.moe.num_experts": experts}, **(ONE if experts == 1 else {}), **seeds)
        for steps in STEPS:
            add({"model.pattern": ("attention+dense",), "train.steps": steps}, **seeds)
