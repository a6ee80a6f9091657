"""Qwen3.5-35B-A3B, text (2026): 34.7 billion parameters, 3 active.

python scripts/plan.py --config=configs/models/qwen3_5_35b_a3b.py --topology=v5p:8x8x8

Counted: Gated DeltaNet in three layers of four and the gate of full attention are missing. Every layer sparse, 8 of 256 experts and a
gated shared one. Source: config.json of Qwen/Qwen3.5-35B-A3B. The publisher's active number is A or B, rounded.
"""

import ml_collections

from moejax.plan import published


def get_config() -> ml_collections.ConfigDict:
    c = published.begin("qwen3_5_35b_a3b", vocabulary=248320)
    m = c.model
    m.width, m.repeats = 2048, 10
    m.pattern = ("gated_delta+sparse",) * 3 + ("gated_attention+sparse",)
    m.heads, m.kv_heads, m.head_dim = 16, 2, 256
    m.attention.norm = "head"
    m.rope_theta, m.rope.fraction = 1e7, 0.25
    m.moe.num_experts, m.moe.top_k, m.moe.hidden = 256, 8, 512
    m.moe.shared_hidden, m.moe.shared_gate = 512, True
    m.moe.load_balance, m.moe.router_z = 0.001, 0.0
    c.counted = {
        "gated_delta": {"key_heads": 16, "value_heads": 32, "head": 128, "conv": 4},
        "gated_attention": {},
    }
    return c
