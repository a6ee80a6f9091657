"""Llama 4: chunked attention with rotary positions, and in between full attention without; the gate multiplies an expert's input."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moejax import config
from moejax.checkpoint.hugging_face import depth, rotary, weights
from moejax.checkpoint.hugging_face.families.api import BUFFERS, Family, experts, of_sizes, sizes
from moejax.checkpoint.hugging_face.fields import Fields
from moejax.checkpoint.hugging_face.weights import Line
from moejax.checkpoint.rules import Rule
from moejax.config_attention import Attention
from moejax.errors import UserError

LAYERS = {"chunked_attention": "local", "full_attention": "attention"}
PREFIX = "language_model."
TEXT = "llama4_text"
VISION = {
    "vision_model.{leaf:*}": "moejax computes the text decoder alone",
    "multi_modal_projector.{leaf:*}": "moejax computes the text decoder alone",
}


def _read(fields: Fields) -> config.Model:
    fields.pass_over("for_llm_compressor")
    bias = fields.get("attention_bias", default=False)
    norm = "l2" if fields.get("use_qk_norm", default=True) else "none"
    tuned = bool(fields.get("attn_temperature_tuning", default=True))
    scale, positions = float(fields.get("attn_scale", default=0.1)), int(fields.get("floor_scale", default=8192))
    full = Attention(
        bias=bias, out_bias=bias, rotary=False, temperature=scale if tuned else 0.0, temperature_positions=positions
    )
    local = Attention(bias=bias, out_bias=bias, norm=norm, chunk=fields.get("attention_chunk_size", default=0))
    hidden = fields.get("intermediate_size")
    moe = experts(
        num_experts=fields.get("num_local_experts"), top_k=fields.get("num_experts_per_tok"), hidden=hidden, shared_hidden=hidden,
        score="sigmoid", renormalize=False, gate_at="input",
    )  # fmt: skip
    own = sizes(fields, hidden=fields.get("intermediate_size_mlp"), moe=moe, attention=full, local=local)
    return config.Model(**own, **rotary.read(fields, interleaved=True), **depth.fold(_layers(fields)))


def _layers(fields: Fields) -> list[str]:
    """`local` where positions turn, `attention` where not, as no_rope_layers (1 for those that turn!) and layer_types say."""
    number, every = fields.get("num_hidden_layers"), fields.get("no_rope_layer_interval", default=4)
    turned = fields.get("no_rope_layers", default=[]) or [int((n + 1) % every != 0) for n in range(number)]
    wanted = ["chunked_attention" if turns else "full_attention" for turns in turned]
    types = fields.get("layer_types", default=wanted)
    if len(turned) != number or types != wanted:
        raise UserError(
            f"{fields.where}: no_rope_layers={turned} and layer_types={types}: moejax computes chunks where positions turn alone"
        )
    step = fields.get("interleave_moe_layer_step", default=1)
    sparse = fields.get("moe_layers", default=list(range(step - 1, number, step)))
    return [f"{LAYERS[name]}+{'sparse' if n in sparse else 'dense'}" for n, name in enumerate(types)]


def _write(model: config.Model) -> dict[str, Any]:
    full, local, kinds = model.attention, model.local, config.layers(model)
    turned = [int(kind.startswith("local+")) for kind in kinds]
    return of_sizes(model) | {
        "intermediate_size": model.moe.hidden, "intermediate_size_mlp": model.hidden, "num_local_experts": model.moe.num_experts,
        "num_experts_per_tok": model.moe.top_k, "attention_bias": full.bias, "use_qk_norm": local.norm == "l2",
        "attn_temperature_tuning": full.temperature > 0, "attn_scale": full.temperature or 0.1, "floor_scale": full.temperature_positions,
        "attention_chunk_size": local.chunk or None, "no_rope_layers": turned, "moe_layers": depth.of_channel(model, "sparse"),
        "layer_types": [list(LAYERS)[1 - turns] for turns in turned], "rope_parameters": rotary.write(model),
    }  # fmt: skip


def _sparse(model: config.Model, channel: str) -> list[Line]:
    return [
        *weights.router("feed_forward.router"),
        weights.fused("feed_forward.experts.gate_up_proj", "{part:gate|up}", axis=2),
        Line("feed_forward.experts.down_proj", "channel/experts/0/down"),
        *weights.shared(model, "feed_forward.shared_expert"),
    ]


def _rules(model: config.Model, prefix: str = "") -> tuple[Rule, ...]:
    parts = weights.MIXERS | {"dense": lambda model, channel: weights.dense("feed_forward"), "sparse": _sparse}
    return weights.rules(model, parts, prefix)


def _read_whole(fields: Fields) -> config.Model:
    """The text decoder of a model that also sees."""
    fields.must(tie_word_embeddings=False)
    fields.pass_over("vision_config", "boi_token_index", "eoi_token_index", "image_token_index")
    text = fields.section("text_config")
    model = _read(text)
    text.done()
    return model


def _ignored_whole(fields: Fields) -> Mapping[str, str]:
    return VISION | {f"{PREFIX}{pattern}": why for pattern, why in BUFFERS.items()}


LLAMA4_TEXT = Family("Llama4ForCausalLM", _read, _write, _rules)
LLAMA4 = Family(
    "Llama4ForConditionalGeneration",
    _read_whole,
    _write,
    lambda model: _rules(model, PREFIX),
    _ignored_whole,
    written_as=TEXT,
)
