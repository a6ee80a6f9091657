"""GLM-4.5 (Zhipu 2025): 353 billion parameters, 32 active.

python scripts/plan.py --config=configs/models/glm_4_5.py --topology=v5p:8x8x8

Built. Three dense layers first, 8 of 160 experts by sigmoid scores and a bias, a shared expert. Source: config.json of zai-org/GLM-4.5;
its module for a further token is left out. The publisher's active number leaves both embeddings out (C).
"""

import ml_collections

from moejax.plan import published


def get_config() -> ml_collections.ConfigDict:
    c = published.begin("glm_4_5", vocabulary=151552)
    m = c.model
    m.width, m.repeats, m.pattern = 5120, 89, ("attention+sparse",)
    m.first, m.hidden = ("attention+dense",) * 3, 12288
    m.heads, m.kv_heads, m.head_dim = 96, 8, 128
    m.attention.bias, m.attention.norm = True, "head"
    m.rope_theta, m.rope.fraction, m.norm_epsilon = 1e6, 0.5, 1e-5
    m.moe.num_experts, m.moe.top_k, m.moe.hidden, m.moe.shared_hidden = 160, 8, 1536, 1536
    published.deepseek_routing(c, gate_scale=2.5)
    return c
