"""Switch-C (Fedus et al. 2021): 1,571 billion parameters.

python scripts/plan.py --config=configs/models/switch_c.py --topology=v5p:8x8x8

Counted: a T5 encoder and decoder of 15 layers each, all sparse with 1 of 2,048 experts without a gate. An encoder, attention to it,
relative biases and one embedding for input and output are missing. Source: the paper and config.json of google/switch-c-2048. No active
number is published.
"""

import ml_collections

from moejax.plan import published


def get_config() -> ml_collections.ConfigDict:
    c = published.begin("switch_c", vocabulary=32128)
    m = c.model
    m.width, m.repeats, m.pattern = 2080, 15, ("attention+cross+sparse",)
    m.heads, m.kv_heads, m.head_dim = 32, 32, 64
    m.moe.router, m.moe.num_experts, m.moe.top_k, m.moe.hidden = "switch", 2048, 1, 6144
    m.moe.activation = "relu"
    c.counted = {
        "encoder": {"pattern": ("attention+sparse",), "repeats": 15},
        "cross": {},
        "relative_bias": {"buckets": 32},
        "tied": {},
    }
    return c
