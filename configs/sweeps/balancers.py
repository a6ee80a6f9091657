"""Every balancer of docs/balancers.md in the default experiment, each with everything else off.

python scripts/sweep.py --config=configs/sweeps/balancers.py --engine=local --workdir=runs/balancers --at_once=2

Two cores without an accelerator, two runs at a time: about two minutes a run. What 200 steps of one seed gave is in docs/balancers.md;
not run to its end here.
"""

import pathlib

import ml_collections

from moejax.bench.balancers import BALANCERS, NONE
from moejax.sweep import grid

TINY = str(pathlib.Path(__file__).parents[1] / "tiny.py")


def get_config() -> ml_collections.ConfigDict:
    return grid.load(TINY).get_config("sparse")


def sweep(add):
    for seed in range(3):
        for name, options in BALANCERS.items():
            moe = {f"model.moe.{key}": value for key, value in (NONE | options).items()}
            add(moe, **{"name": name, "train.seed": seed, "data.seed": seed})
