"""DeepSeek-V3 and R1 (2024): 671 billion parameters, 37 active.

python scripts/plan.py --config=configs/models/deepseek_v3.py --topology=v5p:8x8x8

Built. Latent attention, 3 dense layers first, 8 of 256 experts from 4 of 8 groups, a shared expert. Source: the technical report,
section 4.2, and config.json of deepseek-ai/DeepSeek-V3; its module for a further token is left out (model.further=1 adds it). The
publisher's active number leaves the input embedding out (B).
"""

import ml_collections

from moejax.plan import published


def get_config() -> ml_collections.ConfigDict:
    c = published.begin("deepseek_v3", vocabulary=129280)
    m = c.model
    m.width, m.repeats, m.pattern = 7168, 58, ("latent+sparse",)
    m.first, m.hidden = ("latent+dense",) * 3, 18432
    m.heads, m.kv_heads, m.head_dim = 128, 128, 192
    m.latent.query_rank, m.latent.rank = 1536, 512
    m.latent.nope, m.latent.rope, m.latent.value = 128, 64, 128
    m.rope_theta, m.rope.interleaved = 10000.0, True
    published.yarn(c, 40.0, mscale=1.0, mscale_all=1.0)
    m.moe.num_experts, m.moe.top_k, m.moe.hidden, m.moe.shared_hidden = 256, 8, 2048, 2048
    m.moe.router_groups, m.moe.router_groups_kept = 8, 4
    published.deepseek_routing(c, gate_scale=2.5)
    return c
