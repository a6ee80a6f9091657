"""A dense model of the shape of Llama 3 70B (Meta 2024): 70.6 billion parameters.

python scripts/plan.py --config=configs/models/dense_70b.py --topology=v5p:8x8x8

Built. The dense side of plan/introduction.py. Source: config.json of meta-llama/Meta-Llama-3-70B.
"""

import ml_collections

from moejax.plan import published


def get_config() -> ml_collections.ConfigDict:
    c = published.begin("dense_70b", vocabulary=128256)
    m = c.model
    m.width, m.repeats, m.pattern = 8192, 80, ("attention+dense",)
    m.hidden = 28672
    m.heads, m.kv_heads, m.head_dim = 64, 8, 128
    m.rope_theta, m.norm_epsilon = 500000.0, 1e-5
    return c
