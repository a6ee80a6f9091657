"""Qwen3-MoE and GLM-4.5: attention whose heads are normalised one by one, layers of which some are dense."""

from __future__ import annotations

from typing import Any

from moejax import config
from moejax.checkpoint.hugging_face import depth, rotary, weights
from moejax.checkpoint.hugging_face.families.api import (
    Family,
    dense_first,
    experts,
    extra_layers,
    of_depth,
    of_sizes,
    sizes,
    stack,
)
from moejax.checkpoint.hugging_face.fields import Fields
from moejax.config_attention import Attention

MTP = ("num_nextn_predict_layers", "num_mtp_layers")


def _qwen3(fields: Fields) -> config.Model:
    fields.pass_over("max_window_layers")
    fields.must(layer_types=["full_attention"] * fields.get("num_hidden_layers"))
    bias, windowed = fields.get("attention_bias", default=False), fields.get("use_sliding_window", default=False)
    window = fields.get("sliding_window", default=0)
    attention = Attention(norm="head", bias=bias, out_bias=bias, window=window if windowed else 0)
    moe = experts(
        num_experts=fields.get("num_experts", "num_local_experts"), top_k=fields.get("num_experts_per_tok"),
        hidden=fields.get("moe_intermediate_size"), renormalize=fields.get("norm_topk_prob", default=False),
    )  # fmt: skip
    own = sizes(fields, hidden=fields.get("intermediate_size"), moe=moe, attention=attention)
    return config.Model(**own, **rotary.read(fields), **stack(*channels(fields)))


def channels(fields: Fields) -> list[str]:
    """Of every layer: dense where it is listed, and between the layers that are sparse every so often."""
    listed, every = fields.get("mlp_only_layers", default=[]), fields.get("decoder_sparse_step", default=1)
    dense = lambda n: n in listed or (n + 1) % every  # noqa: E731
    return ["dense" if dense(n) else "sparse" for n in range(fields.get("num_hidden_layers"))]


def _write_qwen3(model: config.Model) -> dict[str, Any]:
    moe, attention = model.moe, model.attention
    return of_sizes(model) | {
        "intermediate_size": model.hidden, "moe_intermediate_size": moe.hidden, "num_experts": moe.num_experts,
        "num_experts_per_tok": moe.top_k, "norm_topk_prob": moe.renormalize, "rope_parameters": rotary.write(model),
        "attention_bias": attention.bias, "use_sliding_window": attention.window > 0, "sliding_window": attention.window or None,
        "decoder_sparse_step": 1, "mlp_only_layers": depth.of_channel(model, "dense"),
    }  # fmt: skip


def _glm4(fields: Fields) -> config.Model:
    norm = "head" if fields.get("use_qk_norm", default=False) else "none"
    fields.pass_over(*MTP)
    attention = Attention(norm=norm, bias=fields.get("attention_bias", default=False))
    own = sizes(fields, hidden=fields.get("intermediate_size"), moe=corrected(fields), attention=attention)
    layers = of_depth(fields, fields.get("first_k_dense_replace"))
    return config.Model(**own, **rotary.read(fields, fraction=0.5), **stack(*layers))


def corrected(fields: Fields) -> config.MoE:
    """Sigmoid scores, a bias on selection, limits on groups, a shared expert: as DeepSeek-V3 and after it."""
    fields.must(scoring_func="sigmoid", topk_method="noaux_tc")
    return experts(
        **grouped_experts(fields),
        score="sigmoid",
        selection_bias=True,
        renormalize=fields.get("norm_topk_prob", default=True),
    )


def grouped_experts(fields: Fields) -> dict[str, Any]:
    """Sizes of the experts, groups and the factor on gates."""
    hidden = fields.get("moe_intermediate_size")
    return {
        "num_experts": fields.get("n_routed_experts", "num_local_experts", "num_experts"), "top_k": fields.get("num_experts_per_tok"),
        "hidden": hidden, "shared_hidden": hidden * fields.get("n_shared_experts", default=0),
        "router_groups": fields.get("n_group", default=1), "router_groups_kept": fields.get("topk_group", default=1),
        "gate_scale": float(fields.get("routed_scaling_factor", default=1.0)),
    }  # fmt: skip


def of_grouped_experts(model: config.Model) -> dict[str, Any]:
    """The inverse of `grouped_experts`, and of the layers that are dense."""
    moe = model.moe
    return {
        "intermediate_size": model.hidden, "moe_intermediate_size": moe.hidden, "n_routed_experts": moe.num_experts,
        "num_experts_per_tok": moe.top_k, "n_shared_experts": moe.shared_hidden // moe.hidden, "n_group": moe.router_groups,
        "topk_group": moe.router_groups_kept, "routed_scaling_factor": moe.gate_scale, "norm_topk_prob": moe.renormalize,
        "first_k_dense_replace": dense_first(model), "rope_parameters": rotary.write(model),
    }  # fmt: skip


def _write_glm4(model: config.Model) -> dict[str, Any]:
    own = {
        "use_qk_norm": model.attention.norm == "head",
        "attention_bias": model.attention.bias,
        "num_nextn_predict_layers": 0,
    }
    found = of_sizes(model) | of_grouped_experts(model) | own
    found["rope_parameters"]["partial_rotary_factor"] = model.rope.fraction
    return found


QWEN3_MOE = Family("Qwen3MoeForCausalLM", _qwen3, _write_qwen3, weights.mlp_rules)
GLM4_MOE = Family(
    "Glm4MoeForCausalLM", _glm4, _write_glm4, weights.mlp_rules, lambda fields: extra_layers(fields, *MTP)
)
