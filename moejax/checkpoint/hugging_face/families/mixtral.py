"""Mixtral, OLMoE and MiniMax-M2: every layer sparse, one kind of attention."""

from __future__ import annotations

from typing import Any

from moejax import config
from moejax.checkpoint.hugging_face import rotary, weights
from moejax.checkpoint.hugging_face.families.api import Family, experts, extra_layers, of_depth, of_sizes, sizes, stack
from moejax.checkpoint.hugging_face.fields import Fields
from moejax.checkpoint.rules import Rule
from moejax.config_attention import Attention

MTP = ("num_mtp_modules",)


def _mixtral(fields: Fields) -> config.Model:
    hidden = fields.get("intermediate_size")
    moe = experts(num_experts=fields.get("num_local_experts"), top_k=fields.get("num_experts_per_tok"), hidden=hidden)
    attention = Attention(window=fields.get("sliding_window", default=0))
    return config.Model(
        **sizes(fields, hidden=hidden, moe=moe, attention=attention), **rotary.read(fields), **stack(*of_depth(fields))
    )


def _write_mixtral(model: config.Model) -> dict[str, Any]:
    return (
        of_sizes(model)
        | _of_experts(model)
        | {"num_local_experts": model.moe.num_experts, "sliding_window": model.attention.window or None}
    )


def _of_experts(model: config.Model) -> dict[str, Any]:
    return {
        "intermediate_size": model.moe.hidden, "num_experts_per_tok": model.moe.top_k, "rope_parameters": rotary.write(model),
    }  # fmt: skip


def _sparse_block(model: config.Model, channel: str) -> list[weights.Line]:
    return [*weights.router("block_sparse_moe.gate"), *weights.experts(model, "block_sparse_moe.experts", "w1|w3|w2")]


def _block_rules(model: config.Model) -> tuple[Rule, ...]:
    parts = weights.MIXERS | {"sparse": _sparse_block}
    return weights.rules(model, parts, correction="block_sparse_moe.e_score_correction_bias")


def _olmoe(fields: Fields) -> config.Model:
    fields.must(clip_qkv=None)
    hidden, bias = fields.get("intermediate_size"), fields.get("attention_bias", default=False)
    moe = experts(
        num_experts=fields.get("num_experts", "num_local_experts"), top_k=fields.get("num_experts_per_tok"), hidden=hidden,
        renormalize=fields.get("norm_topk_prob", default=False),
    )  # fmt: skip
    attention = Attention(norm="whole", bias=bias, out_bias=bias)
    return config.Model(
        **sizes(fields, hidden=hidden, moe=moe, attention=attention), **rotary.read(fields), **stack(*of_depth(fields))
    )


def _write_olmoe(model: config.Model) -> dict[str, Any]:
    own = {
        "num_experts": model.moe.num_experts, "norm_topk_prob": model.moe.renormalize, "attention_bias": model.attention.bias,
        "clip_qkv": None,
    }  # fmt: skip
    return of_sizes(model) | _of_experts(model) | own


def _minimax(fields: Fields) -> config.Model:
    fields.must(
        use_qk_norm=True, qk_norm_type="per_layer", scoring_func="sigmoid", use_routing_bias=True, shared_intermediate_size=0,
        sliding_window=None, layernorm_full_attention_beta=1.0, layernorm_mlp_beta=1.0,
    )  # fmt: skip
    fields.must(attn_type_list=[1] * fields.get("num_hidden_layers"))
    fields.pass_over(
        *MTP,
        "mtp_transformer_layers",
        "use_mtp",
        "mlp_intermediate_size",
        "shared_moe_mode",
        "layernorm_linear_attention_beta",
    )
    hidden = fields.get("intermediate_size")
    moe = experts(
        num_experts=fields.get("num_local_experts"), top_k=fields.get("num_experts_per_tok"), hidden=hidden, score="sigmoid",
        selection_bias=True,
    )  # fmt: skip
    own = sizes(fields, hidden=hidden, moe=moe, attention=Attention(norm="whole"))
    fraction = fields.get("rotary_dim", default=own["head_dim"]) / own["head_dim"]
    return config.Model(**own, **rotary.read(fields, fraction=fraction), **stack(*of_depth(fields)))


MIXTRAL = Family("MixtralForCausalLM", _mixtral, _write_mixtral, _block_rules)
OLMOE = Family("OlmoeForCausalLM", _olmoe, _write_olmoe, weights.mlp_rules)
MINIMAX_M2 = Family(
    "MiniMaxM2ForCausalLM", _minimax,
    lambda model: of_sizes(model) | _of_experts(model) | {"num_local_experts": model.moe.num_experts}, _block_rules,
    lambda fields: extra_layers(fields, *MTP),
)  # fmt: skip
