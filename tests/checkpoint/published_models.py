"""Tiny published models: config.json of every family, and random tensors under the names of its rules."""

import json

import numpy as np
import safetensors.numpy
from models.published import leaves

from moejax.checkpoint.hugging_face import outline
from moejax.checkpoint.hugging_face.families import FAMILIES
from moejax.checkpoint.hugging_face.fields import Fields

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
    "qwen2_moe": SIZES | {
        "intermediate_size": 20, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 12, "num_hidden_layers": 3,
        "num_experts": 12, "norm_topk_prob": False, "rope_theta": 1e6, "qkv_bias": True, "max_window_layers": 3, "sliding_window": 4096,
        "use_sliding_window": False,
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
    shapes = outline.shapes(FAMILIES[name].rules(model), leaves(model))
    rng = np.random.default_rng(seed)
    return {path: rng.normal(size=shape).astype(dtype) for path, shape in shapes.items()}


def write(folder, name, tensors=None, config=None):
    """A folder with one file, written by the safetensors library."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config or CONFIGS[name]))
    safetensors.numpy.save_file(weights(name) if tensors is None else tensors, folder / "model.safetensors")
    return folder
