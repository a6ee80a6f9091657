"""A sparse byte model and its dense twin on the standard library's own text.

python scripts/train.py --config=configs/tiny.py --workdir=runs/tiny_sparse          16 experts, 2 a token
python scripts/train.py --config=configs/tiny.py:dense --workdir=runs/tiny_dense     equal active FLOPs per token
python scripts/compare.py --workdir=runs/tiny                                        both, and the twin at equal time
"""

import ml_collections

from moejax import config


def get_config(variant: str = "sparse") -> ml_collections.ConfigDict:
    c = config.default()
    c.name = variant
    c.model.pattern = {"sparse": ("attention+sparse",), "dense": ("attention+dense",)}[variant]
    c.model.unroll = c.model.repeats
    c.model.hidden = c.model.moe.top_k * c.model.moe.hidden
    # Gates that sum to K: each expert weighs what its share of the dense layer's hidden width does.
    c.model.moe.gate_scale = float(c.model.moe.top_k)
    c.train.steps = 800
    c.train.log_every = 50
    c.train.eval_every = 100
    c.train.eval_rows = 256
    c.train.routing_every = 200
    c.checkpoint.every = 200
    return c
