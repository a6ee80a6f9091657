"""GLM-4.5-Air (Zhipu 2025): 107 billion parameters, 12 active.

python scripts/plan.py --config=configs/models/glm_4_5_air.py --topology=v5p:8x8x8

Built. One dense layer first, 8 of 128 experts by sigmoid scores and a bias, a shared expert. Source: config.json of zai-org/GLM-4.5-Air;
its module for a further token is left out. The publisher's active number leaves both embeddings out (C).
"""

import ml_collections

from moejax.plan import published


def get_config() -> ml_collections.ConfigDict:
    c = published.begin("glm_4_5_air", vocabulary=151552)
    m = c.model
    m.width, m.repeats, m.pattern = 4096, 45, ("attention+sparse",)
    m.first, m.hidden = ("attention+dense",), 10944
    m.heads, m.kv_heads, m.head_dim = 96, 8, 128
    m.attention.bias, m.attention.norm = True, "none"
    m.rope_theta, m.rope.fraction, m.norm_epsilon = 1e6, 0.5, 1e-5
    m.moe.num_experts, m.moe.top_k, m.moe.hidden, m.moe.shared_hidden = 128, 8, 1408, 1408
    published.deepseek_routing(c, gate_scale=1.0)
    return c
