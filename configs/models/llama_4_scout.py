"""Llama 4 Scout, text (Meta 2025): 108 billion parameters, 17 active.

python scripts/plan.py --config=configs/models/llama_4_scout.py --topology=v5p:8x8x8

Built. Attention in pieces with rotary positions, every fourth layer full without; every layer sparse, 1 of 16 experts and a shared one.
Source: config.json of meta-llama/Llama-4-Scout-17B-16E. The publisher's active number counts everything that a token meets (A).
"""

import ml_collections

from moejax.plan import published


def get_config() -> ml_collections.ConfigDict:
    c = published.begin("llama_4_scout", vocabulary=202048)
    m = c.model
    m.width, m.repeats = 5120, 12
    m.pattern = ("local+sparse",) * 3 + ("attention+sparse",)
    m.heads, m.kv_heads, m.head_dim = 40, 8, 128
    m.attention.rotary, m.attention.temperature = False, 0.1
    m.local.chunk, m.local.norm = 8192, "l2"
    m.rope_theta, m.rope.interleaved, m.norm_epsilon = 500000.0, True, 1e-5
    m.rope.scaling, m.rope.factor, m.rope.original_context = "llama3", 16.0, 8192
    m.rope.low_frequency, m.rope.high_frequency = 1.0, 1.000001  # published as 1 and 1: a step and no ramp
    m.moe.num_experts, m.moe.top_k, m.moe.hidden, m.moe.shared_hidden = 16, 1, 8192, 8192
    m.moe.score, m.moe.renormalize, m.moe.gate_at = "sigmoid", False, "input"
    m.moe.load_balance, m.moe.router_z = 0.001, 0.0
    return c
