"""Qwen3-235B-A22B (2025): 235 billion parameters, 22 active.

python scripts/plan.py --config=configs/models/qwen3_235b_a22b.py --topology=v5p:8x8x8

Built. Every layer sparse, 8 of 128 experts, heads of queries and keys normalised one by one, load balanced over the global batch.
Source: config.json of Qwen/Qwen3-235B-A22B. The publisher's active number counts everything that a token meets (A).
"""

import ml_collections

from moejax.plan import published


def get_config() -> ml_collections.ConfigDict:
    c = published.begin("qwen3_235b_a22b", vocabulary=151936)
    m = c.model
    m.width, m.repeats, m.pattern = 4096, 94, ("attention+sparse",)
    m.heads, m.kv_heads, m.head_dim = 64, 4, 128
    m.attention.norm = "head"
    m.rope_theta = 1e6
    m.moe.num_experts, m.moe.top_k, m.moe.hidden = 128, 8, 1536
    m.moe.load_balance, m.moe.router_z = 0.001, 0.0
    return c
