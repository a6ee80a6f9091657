"""gpt-oss: windowed and full attention in turn, sinks, biases everywhere; gate and up of all experts in one tensor, column by column."""

from __future__ import annotations

from typing import Any

from moejax import config
from moejax.checkpoint.hugging_face import depth, rotary, weights
from moejax.checkpoint.hugging_face.families.api import Family, experts, of_sizes, sizes
from moejax.checkpoint.hugging_face.fields import Fields
from moejax.checkpoint.hugging_face.weights import Line
from moejax.checkpoint.rules import Rule
from moejax.config_attention import Attention
from moejax.errors import UserError

LAYERS = {"sliding_attention": "local", "full_attention": "attention"}


def _read(fields: Fields) -> config.Model:
    fields.must(swiglu_alpha=1.702)
    fields.pass_over("initial_context_length")
    bias, number = fields.get("attention_bias", default=True), fields.get("num_hidden_layers")
    layers = fields.get("layer_types", default=[list(LAYERS)[n % 2] for n in range(number)])
    if len(layers) != number or set(layers) - set(LAYERS):
        raise UserError(
            f"{fields.where}: layer_types={layers}: one of {', '.join(LAYERS)} for each of num_hidden_layers={number}"
        )
    attention = {"bias": bias, "out_bias": bias, "sinks": True}
    window = fields.get("sliding_window") if "sliding_attention" in layers else fields.get("sliding_window", default=0)
    hidden = fields.get("intermediate_size")
    moe = experts(
        num_experts=fields.get("num_local_experts", "num_experts"), top_k=fields.get("num_experts_per_tok", "experts_per_token"),
        hidden=hidden, score="softmax_after", router_bias=True, expert_bias=True, activation="gpt_oss",
        activation_clamp=float(fields.get("swiglu_limit", default=7.0)),
    )  # fmt: skip
    own = sizes(
        fields, hidden=hidden, moe=moe, attention=Attention(**attention), local=Attention(**attention, window=window)
    )
    return config.Model(**own, **rotary.read(fields), **depth.fold([f"{LAYERS[name]}+sparse" for name in layers]))


def _write(model: config.Model) -> dict[str, Any]:
    names = {mixer: name for name, mixer in LAYERS.items()}
    return of_sizes(model) | {
        "intermediate_size": model.moe.hidden, "num_local_experts": model.moe.num_experts, "num_experts_per_tok": model.moe.top_k,
        "swiglu_alpha": 1.702, "swiglu_limit": model.moe.activation_clamp, "attention_bias": model.attention.bias,
        "sliding_window": model.local.window or None, "rope_parameters": rotary.write(model),
        "layer_types": [names.get(kind.partition("+")[0], kind) for kind in config.layers(model)],
    }  # fmt: skip


def _sparse(model: config.Model, channel: str) -> list[Line]:
    width = model.moe.hidden
    return [
        *weights.router("mlp.router", bias=True),
        weights.fused("mlp.experts.gate_up_proj", "{part:gate|up}", axis=2, alternating=width),
        weights.fused("mlp.experts.gate_up_proj_bias", "{part:gate_bias|up_bias}", axis=1, alternating=width),
        Line("mlp.experts.down_proj", "channel/experts/0/down"),
        Line("mlp.experts.down_proj_bias", "channel/experts/0/down_bias"),
    ]


def _rules(model: config.Model) -> tuple[Rule, ...]:
    return weights.rules(model, weights.MIXERS | {"sparse": _sparse})


GPT_OSS = Family("GptOssForCausalLM", _read, _write, _rules)
