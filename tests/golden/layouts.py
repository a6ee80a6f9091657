"""Other forms that some families are published in: quantised, with configs of older versions, inside a multimodal model."""

import json

import torch
from golden import quantised
from safetensors.torch import save_file

FP8 = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [quantised.BLOCK] * 2}
MXFP4 = {
    "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"],
    "quant_method": "mxfp4",
}  # fmt: skip
RELEASED = {
    "gpt_oss": {"experts_per_token": 3, "initial_context_length": 32, "quantization_config": MXFP4},
    "deepseek_v3": {
        "ep_size": 1, "moe_layer_freq": 1, "num_nextn_predict_layers": 1, "scoring_func": "sigmoid", "seq_aux": True,
        "topk_method": "noaux_tc", "quantization_config": FP8,
    },
}  # fmt: skip
"""Fields of the released configs that transformers does not write."""

VISION = {
    "model_type": "llama4_vision_model", "hidden_size": 8, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 1,
    "image_size": 28, "patch_size": 14, "projector_input_dim": 8, "projector_output_dim": 8, "vision_output_dim": 8,
}  # fmt: skip


def write_others(here, family, tensors):
    """The family's other forms, in folders beside its own, where it has any."""
    config = json.loads((here / family / "config.json").read_text())
    if family == "gpt_oss":
        _write(here / "gpt_oss_mxfp4", released(config), quantised.in_mxfp4(tensors))
    if family == "deepseek_v3":
        stored = quantised.in_fp8(tensors) | next_tokens(config)
        stored |= {name: x.float() for name, x in stored.items() if name.endswith("e_score_correction_bias")}
        _write(here / "deepseek_v3_fp8", released(config), stored)
    if family == "llama4_text":
        vision = {"vision_model.class_embedding": torch.ones(8, dtype=torch.bfloat16)}
        _write(
            here / "llama4", multimodal(config), {f"language_model.{name}": x for name, x in tensors.items()} | vision
        )


def released(config):
    """A config as versions of transformers before 5 wrote it, with the fields of the release."""
    older = {name: x for name, x in config.items() if name not in ("rope_parameters", "dtype", "num_mtp_layers")}
    scaling = dict(config["rope_parameters"])
    older |= {"rope_theta": scaling.pop("rope_theta"), "rope_scaling": scaling, "torch_dtype": config["dtype"]}
    if config["model_type"] == "deepseek_v3":
        scaling["type"] = scaling.pop("rope_type")
    return older | RELEASED[config["model_type"]]


def next_tokens(config):
    """Some tensors of the layer that predicts one token further, which a decoder leaves out."""
    layer, width = f"model.layers.{config['num_hidden_layers']}", config["hidden_size"]
    norms = {f"{layer}.{name}.weight": torch.ones(width, dtype=torch.bfloat16) for name in ("enorm", "hnorm")}
    return norms | {f"{layer}.eh_proj.weight": torch.ones(width, 2 * width, dtype=torch.bfloat16)}


def multimodal(config):
    """The config of a model that holds a text model and a vision model."""
    text = {name: x for name, x in config.items() if name not in ("architectures", "transformers_version")}
    return {
        "architectures": ["Llama4ForConditionalGeneration"], "model_type": "llama4", "dtype": config["dtype"],
        "boi_token_index": 80, "eoi_token_index": 81, "image_token_index": 82, "tie_word_embeddings": False,
        "text_config": text, "vision_config": VISION,
        "transformers_version": config["transformers_version"],
    }  # fmt: skip


def _write(folder, config, tensors):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    save_file(
        {name: x.contiguous() for name, x in tensors.items()}, folder / "model.safetensors", metadata={"format": "pt"}
    )
