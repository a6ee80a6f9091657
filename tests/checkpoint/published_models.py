"""Tiny published models: config.json of every family, and the shapes of our leaves."""

import json

import jax
import numpy as np
import safetensors.numpy

from moejax.checkpoint.hugging_face import depth, outline
from moejax.checkpoint.hugging_face.families import FAMILIES
from moejax.checkpoint.hugging_face.fields import Fields


def expected_shapes(model):
    """Path of the train state -> shape of every parameter, and of the bias on selection."""
    d, v = model.width, model.vocab_size
    found = {"embedding": (v, d), "unembedding": (d, v), "final_norm/scale": (d,)}
    for i, kind in enumerate(model.first):
        found |= {f"first/{i}/{leaf}": shape for leaf, shape in layer(model, kind).items()}
    for place, kind in enumerate(model.pattern):
        found |= {
            f"blocks/layers/{place}/{leaf}": (model.repeats, *shape) for leaf, shape in layer(model, kind).items()
        }
    found = {f"parameters/{leaf}": shape for leaf, shape in found.items()}
    sparse = depth.of_channel(model, "sparse")
    if model.moe.selection_bias and sparse:
        found["routing/sparse/selection_bias"] = (len(sparse), model.moe.num_experts)
    return {path: jax.ShapeDtypeStruct(shape, np.float32) for path, shape in found.items()}


def layer(model, kind):
    mixer, channel = kind.split("+")
    leaves = (latent if mixer == "latent" else grouped)(model, mixer) | (sparse if channel == "sparse" else dense)(
        model
    )
    return leaves | {"mixer_norm/scale": (model.width,), "channel_norm/scale": (model.width,)}


def grouped(model, mixer):
    options, d, h, kv, dim = getattr(model, mixer), model.width, model.heads, model.kv_heads, model.head_dim
    found = {"query": (d, h, dim), "key": (d, kv, dim), "value": (d, kv, dim), "out": (h, dim, d)}
    if options.bias:
        found |= {"query_bias": (h, dim), "key_bias": (kv, dim), "value_bias": (kv, dim)}
    if options.out_bias:
        found["out_bias"] = (d,)
    if options.norm == "head":
        found |= {"query_norm": (dim,), "key_norm": (dim,)}
    if options.norm == "whole":
        found |= {"query_norm": (h, dim), "key_norm": (kv, dim)}
    if options.sinks:
        found["sinks"] = (h,)
    return {f"mixer/{leaf}": shape for leaf, shape in found.items()}


def latent(model, mixer):
    part, d, h = model.latent, model.width, model.heads
    key = part.nope + part.rope
    found = {"query": (d, h, key)}
    if part.query_rank:
        found = {
            "query_down": (d, part.query_rank),
            "query_norm/scale": (part.query_rank,),
            "query_up": (part.query_rank, h, key),
        }
    found |= {"latent_down": (d, part.rank + part.rope), "latent_norm/scale": (part.rank,), "out": (h, part.value, d)}
    found["latent_up"] = (part.rank, h, part.nope + part.value)
    return {f"mixer/{leaf}": shape for leaf, shape in found.items()}


def dense(model):
    return {"channel/mlp/gate_up": (model.width, 2, model.hidden), "channel/mlp/down": (model.hidden, model.width)}


def sparse(model):
    moe, d = model.moe, model.width
    e, f, s = moe.num_experts, moe.hidden, moe.shared_hidden
    found = {
        "router/logits": (d, e),
        "experts/0/gate": (e, d, f),
        "experts/0/up": (e, d, f),
        "experts/0/down": (e, f, d),
    }
    if moe.router_bias:
        found["router/logits_bias"] = (e,)
    if moe.expert_bias:
        found |= {"experts/0/gate_bias": (e, f), "experts/0/up_bias": (e, f), "experts/0/down_bias": (e, d)}
    if s:
        found |= {"shared/gate_up": (d, 2, s), "shared/down": (s, d)}
    return {f"channel/{leaf}": shape for leaf, shape in found.items()}


# ---- config.json of tiny models -----------------------------------------------------------------------------------

SIZES = {
    "vocab_size": 24, "hidden_size": 16, "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "hidden_act": "silu",
    "tie_word_embeddings": False, "num_experts_per_tok": 2, "initializer_range": 0.02,
    "max_position_embeddings": 64, "eos_token_id": [1, 2],
}  # fmt: skip
LATENT = {
    "num_key_value_heads": 4, "q_lora_rank": 12, "kv_lora_rank": 10, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 8,
}  # fmt: skip
GROUPED = {
    "intermediate_size": 20, "moe_intermediate_size": 8, "n_routed_experts": 12, "n_shared_experts": 2, "n_group": 4, "topk_group": 2,
    "routed_scaling_factor": 2.5, "norm_topk_prob": True, "first_k_dense_replace": 1, "num_hidden_layers": 3, "num_nextn_predict_layers": 1,
}  # fmt: skip
YARN = {
    "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 32.0, "beta_slow": 1.0,
}  # fmt: skip
PLAIN = {"rope_type": "default", "rope_theta": 1e6}
CONFIGS = {
    "mixtral": SIZES | {
        "intermediate_size": 20, "num_hidden_layers": 2, "num_local_experts": 12, "rope_parameters": PLAIN, "sliding_window": 7,
    },
    "olmoe": SIZES | {
        "intermediate_size": 20, "num_hidden_layers": 2, "num_experts": 12, "rope_theta": 1e4, "rope_scaling": None,
        "norm_topk_prob": False, "clip_qkv": None,
    },
    "qwen3_moe": SIZES | {
        "intermediate_size": 20, "moe_intermediate_size": 8, "num_hidden_layers": 5, "num_experts": 12, "norm_topk_prob": True,
        "head_dim": 6, "rope_theta": 1e6, "mlp_only_layers": [0], "decoder_sparse_step": 2, "attention_bias": True, "max_window_layers": 5,
        "sliding_window": 4096, "use_sliding_window": False,
    },
    "gpt_oss": SIZES | {
        "intermediate_size": 32, "hidden_size": 32, "num_hidden_layers": 4, "num_local_experts": 12, "head_dim": 8, "sliding_window": 5,
        "layer_types": ["sliding_attention", "full_attention"] * 2, "rope_theta": 150000.0, "swiglu_limit": 7.0, "experts_per_token": 2,
        "rope_scaling": {name: value for name, value in YARN.items() if name != "rope_theta"} | {"truncate": False},
    },
    "llama4_text": SIZES | {
        "intermediate_size": 8, "intermediate_size_mlp": 20, "num_hidden_layers": 8, "num_local_experts": 12, "num_experts_per_tok": 1,
        "interleave_moe_layer_step": 2, "attention_chunk_size": 6, "attn_temperature_tuning": 4, "no_rope_layers": [], "rope_theta": 5e5,
        "rope_scaling": {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16,
        },
    },
    "glm4_moe": SIZES | GROUPED | {
        "n_group": 1, "topk_group": 1, "head_dim": 8, "use_qk_norm": True, "attention_bias": True,
        "partial_rotary_factor": 0.5, "rope_theta": 1e6,
    },
    "minimax_m2": SIZES | {
        "intermediate_size": 8, "num_hidden_layers": 2, "num_local_experts": 12, "head_dim": 8, "rotary_dim": 4, "rope_theta": 5e6,
        "use_qk_norm": True, "scoring_func": "sigmoid", "attn_type_list": [1, 1],
    },
    "deepseek_v3": SIZES | LATENT | GROUPED | {
        "rope_theta": 10000, "rope_scaling": {"type": "yarn", "mscale": 1.0, "mscale_all_dim": 1.0}
        | {name: value for name, value in YARN.items() if name not in ("rope_type", "rope_theta")},
        "scoring_func": "sigmoid", "topk_method": "noaux_tc", "moe_layer_freq": 1, "ep_size": 1,
    },
    "kimi_k2": SIZES | LATENT | GROUPED | {"n_group": 1, "topk_group": 1, "rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}},
    "deepseek_v2": SIZES | LATENT | GROUPED | {
        "norm_topk_prob": False, "scoring_func": "softmax", "topk_method": "group_limited_greedy",
        "rope_parameters": YARN | {"mscale": 0.7},
        "q_lora_rank": None,
    },
}  # fmt: skip
CONFIGS = {name: tree | {"model_type": name, "torch_dtype": "bfloat16"} for name, tree in CONFIGS.items()}
CONFIGS["llama4"] = {
    "model_type": "llama4", "text_config": CONFIGS["llama4_text"], "vision_config": {"hidden_size": 4}, "image_token_index": 9,
}  # fmt: skip


def read(name, tree=None):
    """The Model of a family's tiny config.json, or of another one."""
    fields = Fields(CONFIGS[name] if tree is None else tree, "config.json")
    model = FAMILIES[name].read(fields)
    fields.done()
    return model


def weights(name, dtype=np.float32, seed=0):
    """Random tensors of a family's tiny model, by their published names."""
    model = read(name)
    shapes = outline.shapes(FAMILIES[name].rules(model), expected_shapes(model))
    rng = np.random.default_rng(seed)
    return {path: rng.normal(size=shape).astype(dtype) for path, shape in shapes.items()}


def write(folder, name, tensors=None, config=None):
    """A folder with one file, written by the safetensors library."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config or CONFIGS[name]))
    safetensors.numpy.save_file(weights(name) if tensors is None else tensors, folder / "model.safetensors")
    return folder
