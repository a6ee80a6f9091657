"""Learning rate against width, with and without the rules of transfer (docs/transfer.md): does the best one stay where it was tuned?

python scripts/sweep.py --config=configs/sweeps/transfer.py --engine=local --workdir=runs/transfer --at_once=2
python scripts/sweep.py --config=configs/sweeps/transfer.py:none --workdir=runs/transfer_none --at_once=2
python scripts/sweep.py --config=configs/sweeps/transfer.py --workdir=runs/transfer --collect \\
    --x=train.learning_rate --by=model.width --picture=transfer.png

Heads, hidden widths and experts' widths grow with the model. 200 steps a run, two cores without an accelerator, two runs at a time.
"""

import pathlib

import ml_collections

from moejax.sweep import grid

TINY = str(pathlib.Path(__file__).parents[1] / "tiny.py")

WIDTHS = (64, 128, 256)
RATES = (1.5e-3, 3e-3, 6e-3, 1.2e-2, 2.4e-2, 4.8e-2)


def get_config(rules: str = "mup") -> ml_collections.ConfigDict:
    c = grid.load(TINY).get_config("sparse")
    c.train.steps, c.train.eval_every, c.checkpoint.every = 200, 200, 200
    c.transfer.rules = rules
    if rules != "none":
        c.transfer.width, c.transfer.heads, c.transfer.expert_hidden = 64, c.model.heads, c.model.moe.hidden
    return c


def sweep(add):
    for width in WIDTHS:
        times = width // 64
        sizes = {"width": width, "heads": 4 * times, "kv_heads": 2 * times, "moe.hidden": 96 * times}
        for rate in RATES:
            rates = {"train.learning_rate": rate, "train.final_learning_rate": rate / 10}
            add({f"model.{name}": value for name, value in sizes.items()}, **rates)
