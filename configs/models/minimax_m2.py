"""MiniMax-M2 and M2.5 (2025): 229 billion parameters, 10 active.

python scripts/plan.py --config=configs/models/minimax_m2.py --topology=v5p:8x8x8

Built. Every layer sparse, 8 of 256 experts by sigmoid scores and a bias, no shared expert. Source: config.json of MiniMaxAI/MiniMax-M2.
The publisher's active number leaves one embedding or both out: B and C round to it.
"""

import ml_collections

from moejax.plan import published


def get_config() -> ml_collections.ConfigDict:
    c = published.begin("minimax_m2", vocabulary=200064)
    m = c.model
    m.width, m.repeats, m.pattern = 3072, 62, ("attention+sparse",)
    m.heads, m.kv_heads, m.head_dim = 48, 8, 128
    m.attention.norm = "whole"
    m.rope_theta, m.rope.fraction = 5e6, 0.5
    m.moe.num_experts, m.moe.top_k, m.moe.hidden = 256, 8, 1536
    published.deepseek_routing(c, gate_scale=1.0)
    return c
