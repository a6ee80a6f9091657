"""Capacity factor: how many slots an expert has, from its fair share to as many as are asked for; dropless beside it.

python scripts/sweep.py --config=configs/sweeps/capacity.py --engine=local --workdir=runs/capacity --at_once=2
python scripts/sweep.py --config=configs/sweeps/capacity.py --workdir=runs/capacity --collect \\
    --x=model.moe.capacity_factor --picture=capacity.png

Evaluation is dropless for all. Two cores without an accelerator, two runs at a time: about two minutes a run; not run to its end here.
"""

import pathlib

import ml_collections

from moejax.sweep import grid

TINY = str(pathlib.Path(__file__).parents[1] / "tiny.py")


def get_config() -> ml_collections.ConfigDict:
    return grid.load(TINY).get_config("sparse")


def get_hyper(hyper):
    seeds = [hyper.sweep(f"config.{part}.seed", range(3)) for part in ("train", "data")]
    factors = hyper.product(
        [
            hyper.fixed("config.model.moe.transport", "scatter"),
            hyper.sweep("config.model.moe.capacity_factor", [0.75, 1.0, 1.25, 1.5, 2.0, 4.0]),
        ]
    )
    dropless = hyper.fixed("config.model.moe.transport", "gather")
    return hyper.product([hyper.zipit(seeds), hyper.chainit([factors, dropless])])
