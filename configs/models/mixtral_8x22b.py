"""Mixtral 8x22B (Mistral 2024): 141 billion parameters, 39 active.

python scripts/plan.py --config=configs/models/mixtral_8x22b.py --topology=v5p:8x8x8

Built. Every layer sparse, 2 of 8 experts. Source: config.json of mistralai/Mixtral-8x22B-v0.1, with the vocabulary of the later
releases. The publisher's active number counts everything that a token meets (A).
"""

import ml_collections

from moejax.plan import published


def get_config() -> ml_collections.ConfigDict:
    c = published.begin("mixtral_8x22b", vocabulary=32768)
    m = c.model
    m.width, m.repeats, m.pattern = 6144, 56, ("attention+sparse",)
    m.heads, m.kv_heads, m.head_dim = 48, 8, 128
    m.rope_theta, m.norm_epsilon = 1e6, 1e-5
    m.moe.num_experts, m.moe.top_k, m.moe.hidden = 8, 2, 16384
    m.moe.load_balance, m.moe.router_z = 0.001, 0.0
    return c
