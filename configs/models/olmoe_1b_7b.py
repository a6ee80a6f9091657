"""OLMoE-1B-7B (Muennighoff et al. 2024): 6.9 billion parameters, 1.3 active.

python scripts/plan.py --config=configs/models/olmoe_1b_7b.py --topology=v5p:8x8x8

Built. Every layer sparse, 8 of 64 experts whose gates are not divided by their sum. Source: the paper and config.json of
allenai/OLMoE-1B-7B-0924. The publisher's active number counts everything that a token meets (A).
"""

import ml_collections

from moejax.plan import published


def get_config() -> ml_collections.ConfigDict:
    c = published.begin("olmoe_1b_7b", vocabulary=50304)
    m = c.model
    m.width, m.repeats, m.pattern = 2048, 16, ("attention+sparse",)
    m.heads, m.kv_heads, m.head_dim = 16, 16, 128
    m.attention.norm = "whole"
    m.norm_epsilon = 1e-5
    m.moe.num_experts, m.moe.top_k, m.moe.hidden = 64, 8, 1024
    m.moe.renormalize = False
    m.moe.load_balance, m.moe.router_z = 0.01, 0.001
    return c
