"""GLM-5 (Zhipu 2026): 744 billion parameters, 40 active.

python scripts/plan.py --config=configs/models/glm_5.py --topology=v5p:8x8x8

Counted: the sparse indexer, by which attention sees the 2,048 best positions, is missing; every layer has one. Latent attention, 3 dense
layers first, 8 of 256 experts, a shared one. Source: config.json of zai-org/GLM-5; its module for a further token is left out. The
publisher's active number leaves both embeddings out (C).
"""

import ml_collections

from moejax.plan import published


def get_config() -> ml_collections.ConfigDict:
    c = published.begin("glm_5", vocabulary=154880)
    m = c.model
    m.width, m.repeats, m.pattern = 6144, 75, ("indexed+sparse",)
    m.first, m.hidden = ("indexed+dense",) * 3, 12288
    m.heads, m.kv_heads, m.head_dim = 64, 64, 256
    m.latent.query_rank, m.latent.rank = 2048, 512
    m.latent.nope, m.latent.rope, m.latent.value = 192, 64, 256
    m.rope_theta, m.rope.interleaved, m.norm_epsilon = 1e6, True, 1e-5
    m.moe.num_experts, m.moe.top_k, m.moe.hidden, m.moe.shared_hidden = 256, 8, 2048, 2048
    published.deepseek_routing(c, gate_scale=2.5)
    c.counted = {"indexed": {"heads": 32, "width": 128, "top": 2048}}
    return c
