"""Tiny models of published families, as tables: the first word of their classes, and what their configs have unlike the defaults.

Widths are such that some matrices are square and others are not, and experts are at least 12, so that neither a lost transposition
nor experts in the order of their names as text goes unseen.
"""

SIZES = {
    "vocab_size": 88, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 128, "pad_token_id": None, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip

LATENT = {
    "num_key_value_heads": 4, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 12,
    "intermediate_size": 48, "moe_intermediate_size": 16, "first_k_dense_replace": 1,
}  # fmt: skip

YARN = {
    "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32,
    "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0,
}  # fmt: skip

FAMILIES = {
    "mixtral": ("Mixtral", {
        "num_hidden_layers": 2, "intermediate_size": 32, "num_local_experts": 12, "num_experts_per_tok": 2, "sliding_window": 8,
    }),
    "olmoe": ("Olmoe", {
        "num_hidden_layers": 2, "num_key_value_heads": 4, "intermediate_size": 24, "num_experts": 12, "num_experts_per_tok": 3,
        "norm_topk_prob": False,
    }),
    "qwen3_moe": ("Qwen3Moe", {
        "num_hidden_layers": 4, "head_dim": 16, "intermediate_size": 48, "moe_intermediate_size": 16, "num_experts": 12,
        "num_experts_per_tok": 3, "norm_topk_prob": True, "mlp_only_layers": [2],
    }),
    "gpt_oss": ("GptOss", {
        "num_hidden_layers": 4, "head_dim": 16, "intermediate_size": 32, "num_local_experts": 12, "num_experts_per_tok": 3,
        "sliding_window": 8,
        "rope_parameters": {
            "rope_type": "yarn", "rope_theta": 150000.0, "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
            "original_max_position_embeddings": 32,
        },
    }),
    "llama4_text": ("Llama4", {
        "num_hidden_layers": 4, "head_dim": 16, "intermediate_size": 16, "intermediate_size_mlp": 48, "num_local_experts": 12,
        "num_experts_per_tok": 1, "interleave_moe_layer_step": 2, "attention_chunk_size": 16, "floor_scale": 8,
        "rope_parameters": {
            "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    }),
    "glm4_moe": ("Glm4Moe", {
        "head_dim": 16, "intermediate_size": 48, "moe_intermediate_size": 16, "n_routed_experts": 12, "n_shared_experts": 1,
        "num_experts_per_tok": 3, "first_k_dense_replace": 1, "routed_scaling_factor": 2.5, "use_qk_norm": True, "attention_bias": True,
    }),
    "minimax_m2": ("MiniMaxM2", {
        "num_hidden_layers": 2, "head_dim": 16, "intermediate_size": 24, "num_local_experts": 12, "num_experts_per_tok": 3,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5000000.0, "partial_rotary_factor": 0.5},
    }),
    "deepseek_v3": ("DeepseekV3", LATENT | {
        "q_lora_rank": 24, "n_routed_experts": 16, "n_shared_experts": 1, "num_experts_per_tok": 3, "n_group": 4, "topk_group": 2,
        "routed_scaling_factor": 2.5, "rope_parameters": YARN,
    }),
    "kimi_k2": ("DeepseekV3", LATENT | {
        "q_lora_rank": 32, "n_routed_experts": 12, "n_shared_experts": 1, "num_experts_per_tok": 3, "n_group": 1, "topk_group": 1,
        "routed_scaling_factor": 2.827, "rms_norm_eps": 1e-5,
        "rope_parameters": YARN | {"beta_fast": 1.0, "original_max_position_embeddings": 4096},
    }),
    "deepseek_v2": ("DeepseekV2", LATENT | {
        "q_lora_rank": None, "moe_intermediate_size": 32, "n_routed_experts": 12, "n_shared_experts": 2, "num_experts_per_tok": 3,
        "topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2, "norm_topk_prob": False, "routed_scaling_factor": 2.0,
    }),
    "qwen2_moe": ("Qwen2Moe", {
        "num_hidden_layers": 4, "intermediate_size": 48, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 32,
        "num_experts": 12, "num_experts_per_tok": 4, "norm_topk_prob": False, "mlp_only_layers": [1],
    }),
}  # fmt: skip
"""Family -> (first word of its classes, config values beside SIZES)."""

LIVE = {
    "mixtral": {"hidden_size": 48, "num_hidden_layers": 3, "intermediate_size": 40, "num_local_experts": 11, "sliding_window": None},
    "olmoe": {"hidden_size": 24, "num_hidden_layers": 3, "num_experts": 13, "num_experts_per_tok": 2, "norm_topk_prob": True},
    "qwen3_moe": {"num_hidden_layers": 6, "mlp_only_layers": [], "decoder_sparse_step": 2, "attention_bias": True},
    "gpt_oss": {"num_hidden_layers": 3, "num_local_experts": 14, "num_experts_per_tok": 4, "intermediate_size": 40},
    "llama4_text": {"num_hidden_layers": 8, "interleave_moe_layer_step": 1, "hidden_size": 40, "attn_temperature_tuning": False},
    "glm4_moe": {
        "num_hidden_layers": 4, "first_k_dense_replace": 2, "use_qk_norm": False, "n_shared_experts": 2, "n_group": 3, "topk_group": 2,
    },
    "minimax_m2": {"num_hidden_layers": 3, "hidden_size": 48, "num_local_experts": 20, "num_experts_per_tok": 4},
    "deepseek_v3": {"num_hidden_layers": 5, "first_k_dense_replace": 3, "q_lora_rank": None, "n_shared_experts": 2, "n_group": 8},
    "kimi_k2": {"hidden_size": 40, "first_k_dense_replace": 0, "n_routed_experts": 21, "num_experts_per_tok": 5},
    "deepseek_v2": {"hidden_size": 48, "q_lora_rank": 24, "topk_method": "greedy", "n_routed_experts": 13, "n_group": None},
    "qwen2_moe": {"num_hidden_layers": 6, "mlp_only_layers": [], "decoder_sparse_step": 3, "qkv_bias": False, "norm_topk_prob": True},
}  # fmt: skip
"""Other values, for models that are made and compared on the spot."""
