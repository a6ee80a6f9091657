"""Every balancer of docs/balancers.md in the default experiment, each with everything else off.

python scripts/sweep.py --config=configs/sweeps/balancers.py --engine=local --workdir=runs/balancers --at_once=2

Two cores without an accelerator, two runs at a time: about two minutes a run. What 200 steps of one seed gave is in docs/balancers.md;
not run to its end here.
"""

import importlib.util
import pathlib

import ml_collections

from moejax.bench.balancers import BALANCERS, NONE


def get_config() -> ml_collections.ConfigDict:
    return _tiny("sparse")


def sweep(add):
    for seed in range(3):
        for name, options in BALANCERS.items():
            moe = {f"model.moe.{key}": value for key, value in (NONE | options).items()}
            add(moe, **{"name": name, "train.seed": seed, "data.seed": seed})


def _tiny(variant: str) -> ml_collections.ConfigDict:
    file = pathlib.Path(__file__).parents[1] / "tiny.py"
    spec = importlib.util.spec_from_file_location("tiny", file)
    tiny = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tiny)
    return tiny.get_config(variant)
