"""Are planted experts found? Text of four known sources, four experts, and an entropy floor that is known exactly.

python scripts/train.py --config=configs/planted.py --workdir=runs/planted            4 experts, one a source
python scripts/train.py --config=configs/planted.py:1 --workdir=runs/planted_1        the same with 1 expert, or 2, 3, 8
python scripts/report.py --workdir=runs/planted --workdir=runs/planted_1

Two cores without an accelerator: about two minutes a run. Bits per byte above the known entropy over three seeds of text and
model: four experts 0.004, 0.005, 0.018; one expert 0.051, 0.027, 0.046 (docs/experiments.md).
"""

import ml_collections

from moejax import config
from moejax.errors import ConfigError


def get_config(experts: str = "4") -> ml_collections.ConfigDict:
    if not experts.isdigit():
        raise ConfigError(f"--config=configs/planted.py:{experts}: the number of experts, such as :4")
    c = config.default()
    c.name = f"E={experts}"
    c.data.source = "planted"
    c.data.planted_documents = 170_000
    c.data.context = 64
    c.data.batch = 64
    c.model.width = 32
    c.model.repeats = 1
    c.model.heads = c.model.kv_heads = 2
    c.model.moe.router = "switch"
    c.model.moe.num_experts = int(experts)
    c.model.moe.top_k = 1
    # An expert of width 2 has room for the table of one source.
    c.model.moe.hidden = 2
    # Experts divide letters where the router commits itself before attention has found the source.
    c.model.moe.jitter = 0.3
    c.train.warmup = 300
    c.train.steps = 2500
    c.train.learning_rate = 0.03
    c.train.final_learning_rate = 1e-4
    c.train.weight_decay = 0.0
    c.train.log_every = 50
    c.train.eval_every = 250
    return c
