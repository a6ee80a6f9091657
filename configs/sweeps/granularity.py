"""Top-k against granularity at equal cost: the same hidden units in all, and as many a token, in 8 large experts or 128 small ones.

python scripts/sweep.py --config=configs/sweeps/granularity.py --engine=local --workdir=runs/granularity --at_once=2
python scripts/sweep.py --config=configs/sweeps/granularity.py --workdir=runs/granularity --collect \\
    --x=model.moe.top_k --picture=granularity.png

Krajewski et al. 2024 (arXiv 2402.07871) call width over expert width granularity and find that more of it helps. Gates sum to K, as
in configs/tiny.py; of one choice the gate is its probability. Two cores, two runs at a time: about two minutes a run; not run to its
end here.
"""

import pathlib

import ml_collections

from moejax.sweep import grid

TINY = str(pathlib.Path(__file__).parents[1] / "tiny.py")


def get_config() -> ml_collections.ConfigDict:
    return grid.load(TINY).get_config("sparse")


def sweep(add):
    for seed in range(3):
        for k in (1, 2, 4, 8, 16):
            sizes = {"top_k": k, "num_experts": 8 * k, "hidden": 192 // k, "gate_scale": float(k), "renormalize": k > 1}
            add(
                {f"model.moe.{name}": value for name, value in sizes.items()}, **{"train.seed": seed, "data.seed": seed}
            )
