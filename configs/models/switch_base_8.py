"""switch-base-8 (Fedus et al. 2021): 619 million parameters.

python scripts/plan.py --config=configs/models/switch_base_8.py --topology=v5p:8x8x8

Counted: a T5 encoder and decoder, every second layer sparse with 1 of 8 experts without a gate. An encoder, attention to it, relative
biases and one embedding for input and output are missing. Source: config.json of google/switch-base-8. No active number is published.
"""

import ml_collections

from moejax.plan import published


def get_config() -> ml_collections.ConfigDict:
    c = published.begin("switch_base_8", vocabulary=32128)
    m = c.model
    m.width, m.repeats, m.pattern = 768, 6, ("attention+cross+plain", "attention+cross+sparse")
    m.heads, m.kv_heads, m.head_dim = 12, 12, 64
    m.moe.router, m.moe.num_experts, m.moe.top_k, m.moe.hidden = "switch", 8, 1, 3072
    m.moe.activation = "relu"
    c.counted = {
        "encoder": {"pattern": ("attention+plain", "attention+sparse"), "repeats": 6},
        "cross": {},
        "plain": {"hidden": 3072},
        "relative_bias": {"buckets": 32},
        "tied": {},
    }
    return c
