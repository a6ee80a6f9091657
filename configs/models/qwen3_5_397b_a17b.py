"""Qwen3.5-397B-A17B, text (2026): 396 billion parameters, 17 active.

python scripts/plan.py --config=configs/models/qwen3_5_397b_a17b.py --topology=v5p:8x8x8

Counted: Gated DeltaNet in three layers of four and the gate of full attention are missing. Every layer sparse, 10 of 512 experts and a
gated shared one. Source: config.json of Qwen/Qwen3.5-397B-A17B. The publisher's active number counts everything that a token meets (A).
"""

import ml_collections

from moejax.plan import published


def get_config() -> ml_collections.ConfigDict:
    c = published.begin("qwen3_5_397b_a17b", vocabulary=248320)
    m = c.model
    m.width, m.repeats = 4096, 15
    m.pattern = ("gated_delta+sparse",) * 3 + ("gated_attention+sparse",)
    m.heads, m.kv_heads, m.head_dim = 32, 2, 256
    m.attention.norm = "head"
    m.rope_theta, m.rope.fraction = 1e7, 0.25
    m.moe.num_experts, m.moe.top_k, m.moe.hidden = 512, 10, 1024
    m.moe.shared_hidden, m.moe.shared_gate = 1024, True
    m.moe.load_balance, m.moe.router_z = 0.001, 0.0
    c.counted = {
        "gated_delta": {"key_heads": 16, "value_heads": 64, "head": 128, "conv": 4},
        "gated_attention": {},
    }
    return c
