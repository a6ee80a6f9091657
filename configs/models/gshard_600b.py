"""GShard 600B (Lepikhin et al. 2020): 618 billion parameters of experts.

python scripts/plan.py --config=configs/models/gshard_600b.py --topology=v5p:8x8x8

Counted: an encoder and a decoder, 36 layers of which every second one is sparse with 2 of 2,048 experts without a gate. An encoder and
attention to it are missing. Source: the paper, for width 1,024, hidden width 8,192, 16 heads of 128. Assumed: halves of the 36 layers, a
vocabulary of 64,000, positions without parameters. No active number is published.
"""

import ml_collections

from moejax.plan import published


def get_config() -> ml_collections.ConfigDict:
    c = published.begin("gshard_600b", vocabulary=64000)
    m = c.model
    m.width, m.repeats, m.pattern = 1024, 9, ("attention+cross+plain", "attention+cross+sparse")
    m.heads, m.kv_heads, m.head_dim = 16, 16, 128
    m.moe.router, m.moe.num_experts, m.moe.top_k, m.moe.hidden = "gshard", 2048, 2, 8192
    m.moe.activation = "relu"
    c.counted = {
        "encoder": {"pattern": ("attention+plain", "attention+sparse"), "repeats": 9},
        "cross": {},
        "plain": {"hidden": 8192},
    }
    return c
