"""DeepSeek-V3 and Kimi-K2: latent attention, dense layers first, experts in groups. DeepSeek-V2 has the same parts, otherwise scored."""

from __future__ import annotations

import dataclasses
from typing import Any

from moejax import config
from moejax.checkpoint.hugging_face import rotary, weights
from moejax.checkpoint.hugging_face.families.api import Family, experts, extra_layers, of_depth, of_sizes, sizes, stack
from moejax.checkpoint.hugging_face.families.qwen3 import (
    MTP,
    corrected,
    grouped_experts,
    of_grouped_experts,
)
from moejax.checkpoint.hugging_face.fields import Fields
from moejax.config_attention import Latent


def _model(fields: Fields, moe: config.MoE, *, interleaved: bool) -> config.Model:
    """Everything but the sparse layer's options. The narrow vectors' norm has an epsilon of its own, 1e-6 whatever the model's is."""
    fields.must(
        attention_bias=False, moe_layer_freq=1, mlp_bias=False, num_key_value_heads=fields.get("num_attention_heads")
    )
    fields.pass_over(*MTP, "head_dim", "qk_head_dim")
    latent = Latent(
        query_rank=fields.get("q_lora_rank", default=0), rank=fields.get("kv_lora_rank"), nope=fields.get("qk_nope_head_dim"),
        rope=fields.get("qk_rope_head_dim"), value=fields.get("v_head_dim"), norm_epsilon=1e-6,
    )  # fmt: skip
    own = sizes(
        fields, hidden=fields.get("intermediate_size"), head_dim=latent.nope + latent.rope, moe=moe, latent=latent
    )
    layers = of_depth(fields, fields.get("first_k_dense_replace"))
    return config.Model(**own, **rotary.read(fields, interleaved=interleaved), **stack(*layers, mixer="latent"))


def _write(model: config.Model) -> dict[str, Any]:
    latent, found = model.latent, of_sizes(model) | of_grouped_experts(model)
    del found["head_dim"]
    return found | {
        "q_lora_rank": latent.query_rank or None, "kv_lora_rank": latent.rank, "qk_nope_head_dim": latent.nope,
        "qk_rope_head_dim": latent.rope, "v_head_dim": latent.value, "attention_bias": False,
    }  # fmt: skip


def _v3(fields: Fields) -> config.Model:
    interleaved = fields.get("rope_interleave", default=True)
    return _model(fields, corrected(fields), interleaved=interleaved)


def _write_v3(model: config.Model) -> dict[str, Any]:
    return _write(model) | {"rope_interleave": model.rope.interleaved, "num_nextn_predict_layers": 0}


def _v2(fields: Fields) -> config.Model:
    """Softmax scores that are not divided by their sum, groups ranked by their best expert, no bias on selection."""
    fields.must(scoring_func="softmax", norm_topk_prob=False)
    limited = fields.get("topk_method", default="greedy") == "group_limited_greedy"
    fields.must(topk_method=("greedy", "group_limited_greedy"))
    groups = {"router_groups_best": 1} | ({} if limited else {"router_groups": 1, "router_groups_kept": 1})
    return _model(fields, experts(**grouped_experts(fields) | groups, renormalize=False), interleaved=True)


def _write_v2(model: config.Model) -> dict[str, Any]:
    limited = model.moe.router_groups > 1
    return _write(model) | {
        "topk_method": "group_limited_greedy" if limited else "greedy",
        "moe_layer_freq": 1,
        "mlp_bias": False,
    }


DEEPSEEK_V3 = Family(
    "DeepseekV3ForCausalLM", _v3, _write_v3, weights.mlp_rules, lambda fields: extra_layers(fields, *MTP)
)
KIMI_K2 = dataclasses.replace(DEEPSEEK_V3, written_as="deepseek_v3")
DEEPSEEK_V2 = Family("DeepseekV2ForCausalLM", _v2, _write_v2, weights.mlp_rules)
