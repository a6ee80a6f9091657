"""A sparse model of 399 billion parameters, 40 active: nobody's, with dimensions of our own.

python scripts/plan.py --config=configs/models/sparse_400b.py --topology=v5p:8x8x8

Built. The sparse side of plan/introduction.py. Every layer sparse, 8 of 128 experts and a shared one as wide as two; the vocabulary
of dense_70b.py. The active number counts everything that a token meets (A).
"""

import ml_collections

from moejax.plan import published


def get_config() -> ml_collections.ConfigDict:
    c = published.begin("sparse_400b", vocabulary=128256)
    m = c.model
    m.width, m.repeats, m.pattern = 7168, 68, ("attention+sparse",)
    m.heads, m.kv_heads, m.head_dim = 56, 8, 128
    m.rope_theta, m.norm_epsilon = 500000.0, 1e-5
    m.moe.num_experts, m.moe.top_k, m.moe.hidden, m.moe.shared_hidden = 128, 8, 2048, 4096
    published.deepseek_routing(c, gate_scale=2.5)
    return c
