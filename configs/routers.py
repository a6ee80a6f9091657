"""Every router of docs/routers.md in the default experiment, by name.

python scripts/train.py --config=configs/routers.py:threshold --workdir=runs/threshold
python scripts/report.py --workdir=runs/threshold

Two cores without an accelerator: about three minutes a run at 800 steps; what 200 steps of each gave is on the cards.
`st_moe` is GShard with the settings of Zoph et al. 2022: capacity factor 1.25 in training and 2 at evaluation, z-loss 0.001.
"""

import importlib.util
import pathlib

import ml_collections

from moejax.bench.routers import CAPACITY, ROUTERS
from moejax.errors import ConfigError

VARIANTS = ROUTERS | {
    "st_moe": {"router": "gshard", "eval_capacity_factor": 2.0, "load_balance": 0.01, "router_z": 0.001}
}


def get_config(variant: str = "topk") -> ml_collections.ConfigDict:
    if variant not in VARIANTS:
        raise ConfigError(f"--config=configs/routers.py:{variant}: choose one of {', '.join(VARIANTS)}")
    c = _tiny()
    c.name = variant
    c.model.moe.update(CAPACITY | VARIANTS[variant])
    return c


def _tiny() -> ml_collections.ConfigDict:
    """The experiment next door, wherever this file is called from."""
    spec = importlib.util.spec_from_file_location("tiny", pathlib.Path(__file__).with_name("tiny.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config()
