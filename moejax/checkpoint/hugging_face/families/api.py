"""What a family is: how config.json and a Model say the same thing, and which rules its weights follow."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from moejax import config
from moejax.checkpoint.hugging_face import depth
from moejax.checkpoint.hugging_face.fields import Fields
from moejax.checkpoint.rules import Rule

BUFFERS = {"model.layers.{layer}.self_attn.rotary_emb.inv_freq": "rotary frequencies are computed from the config"}
MOST_CHUNK = 8192
"""Columns of the vocabulary whose logits exist at a time, unless nothing smaller divides it."""


@dataclasses.dataclass(frozen=True)
class Family:
    """Models with one `model_type`."""

    architecture: str
    """Class of transformers that computes it."""
    read: Callable[[Fields], config.Model]
    """config.json -> Model, every field accounted for."""
    write: Callable[[config.Model], dict[str, Any]]
    """Model -> fields of config.json, beside model_type and architectures. What the family cannot say is found by reading it back."""
    rules: Callable[[config.Model], tuple[Rule, ...]]
    """Published names -> paths of the train state."""
    ignored: Callable[[Fields], Mapping[str, str]] = lambda fields: BUFFERS
    """Patterns of published tensors that are left behind, with the reason."""
    written_as: str = ""
    """The model_type that checkpoints are written as, where it is another."""


def sizes(fields: Fields, **given: Any) -> dict[str, Any]:
    """What all families say alike: vocabulary, width, heads, norm."""
    fields.must(hidden_act="silu", tie_word_embeddings=False)
    width, heads, vocabulary = fields.get("hidden_size"), fields.get("num_attention_heads"), fields.get("vocab_size")
    own = {
        "vocab_size": vocabulary, "width": width, "heads": heads, "kv_heads": fields.get("num_key_value_heads", default=heads),
        "norm_epsilon": float(fields.get("rms_norm_eps")), "unroll": 1, "loss_chunk": chunk(vocabulary),
    }  # fmt: skip
    if "head_dim" not in given:
        own["head_dim"] = fields.get("head_dim", default=width // heads)
    return own | given


def chunk(vocabulary: int) -> int:
    """The largest divisor up to MOST_CHUNK; the whole where that is very small."""
    best = max(d for d in range(1, min(MOST_CHUNK, vocabulary) + 1) if vocabulary % d == 0)
    return best if best * 64 >= min(vocabulary, MOST_CHUNK) else vocabulary


def of_sizes(model: config.Model) -> dict[str, Any]:
    """The inverse of `sizes`."""
    return {
        "vocab_size": model.vocab_size, "hidden_size": model.width, "num_hidden_layers": len(config.layers(model)),
        "num_attention_heads": model.heads, "num_key_value_heads": model.kv_heads, "head_dim": model.head_dim,
        "rms_norm_eps": model.norm_epsilon, "hidden_act": "silu", "tie_word_embeddings": False,
    }  # fmt: skip


def experts(**options: Any) -> config.MoE:
    """A sparse layer as it is published: no token is dropped. Losses on the load are off, since the files say nothing of them."""
    return config.MoE(**{"capacity_factor": None, "load_balance": 0.0, "router_z": 0.0} | options)


def stack(*channels: str, mixer: str = "attention") -> dict[str, Any]:
    """first, pattern and repeats of layers that differ in their channel alone."""
    return depth.fold([f"{mixer}+{channel}" for channel in channels])


def of_depth(fields: Fields, dense_first: int = 0) -> tuple[str, ...]:
    """Channels of `num_hidden_layers` layers, so many dense ones first."""
    number = fields.get("num_hidden_layers")
    return ("dense",) * min(dense_first, number) + ("sparse",) * (number - dense_first)


def extra_layers(fields: Fields, *names: str) -> dict[str, str]:
    """Layers past the last one, which predict several tokens at once, and buffers: left behind."""
    number, depth_ = fields.get(*names, default=0), fields.get("num_hidden_layers")
    why = "layers that predict further tokens (MTP) take no part in the next token's logits"
    found = {f"model.layers.{{layer:{depth_}..{depth_ + number - 1}}}.{{leaf:*}}": why} if number else {}
    return BUFFERS | found


def dense_first(model: config.Model) -> int:
    """Dense layers before the first sparse one."""
    return min(depth.of_channel(model, "sparse"), default=len(config.layers(model)))
