"""Qwen2-MoE: softmax over all experts, and a shared expert that a sigmoid of the token gates."""

from __future__ import annotations

from typing import Any

from moejax import config
from moejax.checkpoint.hugging_face import depth, rotary, weights
from moejax.checkpoint.hugging_face.families.api import Family, experts, of_sizes, sizes, stack
from moejax.checkpoint.hugging_face.families.qwen3 import channels
from moejax.checkpoint.hugging_face.fields import Fields
from moejax.checkpoint.hugging_face.weights import TURN, Line
from moejax.checkpoint.rules import Rule
from moejax.config_attention import Attention


def _read(fields: Fields) -> config.Model:
    fields.must(use_sliding_window=False, layer_types=["full_attention"] * fields.get("num_hidden_layers"))
    fields.pass_over("sliding_window", "max_window_layers")
    moe = experts(
        num_experts=fields.get("num_experts", "num_local_experts"), top_k=fields.get("num_experts_per_tok"),
        hidden=fields.get("moe_intermediate_size"), renormalize=fields.get("norm_topk_prob", default=False),
        shared_hidden=fields.get("shared_expert_intermediate_size"), shared_gate=True,
    )  # fmt: skip
    attention = Attention(bias=fields.get("qkv_bias", default=True))
    own = sizes(fields, hidden=fields.get("intermediate_size"), moe=moe, attention=attention)
    return config.Model(**own, **rotary.read(fields), **stack(*channels(fields)))


def _write(model: config.Model) -> dict[str, Any]:
    moe = model.moe
    return of_sizes(model) | {
        "intermediate_size": model.hidden, "moe_intermediate_size": moe.hidden, "shared_expert_intermediate_size": moe.shared_hidden,
        "num_experts": moe.num_experts, "num_experts_per_tok": moe.top_k, "norm_topk_prob": moe.renormalize,
        "qkv_bias": model.attention.bias, "use_sliding_window": False, "rope_parameters": rotary.write(model),
        "decoder_sparse_step": 1, "mlp_only_layers": depth.of_channel(model, "dense"),
    }  # fmt: skip


def _sparse(model: config.Model, channel: str) -> list[Line]:
    return [
        *weights.router("mlp.gate"),
        *weights.experts(model, "mlp.experts"),
        *weights.shared(model, "mlp.shared_expert"),
        Line("mlp.shared_expert_gate.weight", "channel/shared_gate", (TURN,)),
    ]


def _rules(model: config.Model) -> tuple[Rule, ...]:
    parts = weights.MIXERS | {"dense": lambda model, channel: weights.dense("mlp"), "sparse": _sparse}
    return weights.rules(model, parts)


QWEN2_MOE = Family("Qwen2MoeForCausalLM", _read, _write, _rules)
