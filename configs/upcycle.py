"""A trained dense model upcycled to eight experts, against the same model trained on densely for as much compute.

python scripts/compare_upcycled.py --workdir=runs/upcycled --seeds=0,1        all of it, one run after another, with table and picture

Variants: `base` is the dense model of configs/tiny.py; `dense` trains it on; `granular` has 8 experts of half its hidden width, 2 a
token, so that a step costs the same FLOPs; `copies` has 8 of its whole width, 2 a token.

Two cores without an accelerator: about five minutes a run, seven runs for two seeds. Held-out bits per byte at equal compute: dense 1.859,
1.860; granular 1.833, 1.836; copies 1.849, 1.844 (docs/experiments.md).
"""

import importlib.util
import pathlib

import ml_collections

from moejax.errors import ConfigError

WIDTHS = {"granular": 96, "copies": 192}
"""Hidden width of an expert; the dense layer has 192."""
STEPS = {"base": 1600, "dense": 1620, "granular": 1600, "copies": 980}
"""As many steps of each, after the base, as have the same active FLOPs; the dense model has the most."""


def get_config(variant: str = "granular") -> ml_collections.ConfigDict:
    if variant not in STEPS:
        raise ConfigError(f"--config=configs/upcycle.py:{variant}: choose one of {', '.join(STEPS)}")
    c = _tiny("sparse" if variant in WIDTHS else "dense")
    c.name = variant
    c.train.steps = STEPS[variant]
    if variant != "base":
        c.data.seed = 1  # other rows than the base has just seen
        c.train.learning_rate = 3e-3
    if variant in WIDTHS:
        c.model.moe.num_experts = 8
        c.model.moe.hidden = WIDTHS[variant]
    return c


def _tiny(variant: str) -> ml_collections.ConfigDict:
    """The experiment next door, wherever this file is called from."""
    spec = importlib.util.spec_from_file_location("tiny", pathlib.Path(__file__).with_name("tiny.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(variant)
