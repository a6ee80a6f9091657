"""gpt-oss-120b (OpenAI 2025): 116.8 billion parameters, 5.1 active.

python scripts/plan.py --config=configs/models/gpt_oss_120b.py --topology=v5p:8x8x8

Built. Windowed and full attention in turn with sinks, biases everywhere, a clamped activation. Source: the model card and config.json of
openai/gpt-oss-120b. The publisher's active number leaves the input embedding out (B). How its load was balanced is not published; a usual
loss stands in.
"""

import ml_collections

from moejax.plan import published


def get_config() -> ml_collections.ConfigDict:
    c = published.begin("gpt_oss_120b", vocabulary=201088)
    m = c.model
    m.width, m.repeats, m.pattern = 2880, 18, ("local+sparse", "attention+sparse")
    m.heads, m.kv_heads, m.head_dim = 64, 8, 64
    m.rope_theta, m.norm_epsilon = 150000.0, 1e-5
    published.yarn(c, 32.0, truncate=False)
    for attention in (m.attention, m.local):
        attention.bias = attention.out_bias = attention.sinks = True
    m.local.window = 128
    m.moe.num_experts, m.moe.top_k, m.moe.hidden = 128, 4, 2880
    m.moe.score, m.moe.router_bias, m.moe.expert_bias = "softmax_after", True, True
    m.moe.activation, m.moe.activation_clamp = "gpt_oss", 7.0
    return c
