"""Qwen3-30B-A3B (2025): 30.5 billion parameters, 3.3 active.

python scripts/plan.py --config=configs/models/qwen3_30b_a3b.py --topology=v5p:8x8x8

Built. Every layer sparse, 8 of 128 experts, heads of queries and keys normalised one by one, load balanced over the global batch.
Source: config.json of Qwen/Qwen3-30B-A3B. The publisher's active number counts everything that a token meets (A), cut and not rounded.
"""

import ml_collections

from moejax.plan import published


def get_config() -> ml_collections.ConfigDict:
    c = published.begin("qwen3_30b_a3b", vocabulary=151936)
    m = c.model
    m.width, m.repeats, m.pattern = 2048, 48, ("attention+sparse",)
    m.heads, m.kv_heads, m.head_dim = 32, 4, 128
    m.attention.norm = "head"
    m.rope_theta = 1e6
    m.moe.num_experts, m.moe.top_k, m.moe.hidden = 128, 8, 768
    m.moe.load_balance, m.moe.router_z = 0.001, 0.0
    return c
