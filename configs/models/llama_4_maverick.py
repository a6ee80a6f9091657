"""Llama 4 Maverick, text (Meta 2025): 401 billion parameters, 17 active.

python scripts/plan.py --config=configs/models/llama_4_maverick.py --topology=v5p:8x8x8

Built. Attention in pieces with rotary positions, every fourth layer full without; every second layer sparse, 1 of 128 experts and a
shared one. Source: config.json of meta-llama/Llama-4-Maverick-17B-128E. The publisher's active number counts everything that a token
meets (A).
"""

import ml_collections

from moejax.plan import published


def get_config() -> ml_collections.ConfigDict:
    c = published.begin("llama_4_maverick", vocabulary=202048)
    m = c.model
    m.width, m.repeats = 5120, 12
    m.pattern = ("local+dense", "local+sparse", "local+dense", "attention+sparse")
    m.hidden = 16384
    m.heads, m.kv_heads, m.head_dim = 40, 8, 128
    m.attention.rotary, m.attention.temperature = False, 0.1
    m.local.chunk = 8192
    m.rope_theta, m.rope.interleaved, m.norm_epsilon = 500000.0, True, 1e-5
    m.moe.num_experts, m.moe.top_k, m.moe.hidden, m.moe.shared_hidden = 128, 1, 8192, 8192
    m.moe.score, m.moe.renormalize, m.moe.gate_at = "sigmoid", False, "input"
    m.moe.load_balance, m.moe.router_z = 0.001, 0.0
    return c
