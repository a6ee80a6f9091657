"""Kimi K2 (Moonshot 2025): 1,026 billion parameters, 32 active; also the text part of K2.5.

python scripts/plan.py --config=configs/models/kimi_k2.py --topology=v5p:8x8x8

Built. As DeepSeek-V3 with half the heads, one dense layer, 8 of 384 experts and no groups. Source: config.json of
moonshotai/Kimi-K2-Instruct. The published 1.04T is what 61 sparse layers would have. The publisher's active number leaves the input
embedding out (B).
"""

import ml_collections

from moejax.plan import published


def get_config() -> ml_collections.ConfigDict:
    c = published.begin("kimi_k2", vocabulary=163840)
    m = c.model
    m.width, m.repeats, m.pattern = 7168, 60, ("latent+sparse",)
    m.first, m.hidden = ("latent+dense",), 18432
    m.heads, m.kv_heads, m.head_dim = 64, 64, 192
    m.latent.query_rank, m.latent.rank = 1536, 512
    m.latent.nope, m.latent.rope, m.latent.value = 128, 64, 128
    m.rope_theta, m.rope.interleaved = 50000.0, True
    published.yarn(c, 32.0, beta_fast=1.0, mscale=1.0, mscale_all=1.0)
    m.moe.num_experts, m.moe.top_k, m.moe.hidden, m.moe.shared_hidden = 384, 8, 2048, 2048
    published.deepseek_routing(c, gate_scale=2.827)
    return c
