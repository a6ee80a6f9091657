"""Writes tests/golden: a tiny random model of each published family, as files, and what transformers computes with it.

python tests/golden/make.py [FAMILY ...]      in the environment of make parity

<family>/config.json, model.safetensors   as the family is published, in bfloat16 without loss
<family>/expected.npz                     from float32 arithmetic on these weights:
  tokens, mask [B, T]                     rows, of which one is padded on the right
  logits [N, V]                           of the N valid positions, row by row; logits_noise: furthest from the same in float64
  experts/L, weights/L [N, K]             choices of sparse layer L and their weights, by falling weight
  loss, gradient/NAME                     mean cross-entropy of the valid next tokens, and its gradients (of some families); [10] behind
                                          a name is expert 10 of a fused array; gradient_noise as above, over what is stored
gpt_oss_mxfp4, deepseek_v3_fp8            the same weights quantised without loss, with configs in the form they were released in
llama4                                    the weights of llama4_text as a multimodal model names them
"""

import pathlib
import sys

import numpy as np
import torch

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

from golden import families, layouts, quantised, reference

HERE = pathlib.Path(__file__).parent
ROWS, LENGTH, LENGTHS = 2, 40, (40, 27)
ALWAYS = ("model.embed_tokens.weight", "lm_head.weight", "model.norm.weight")
GRADIENTS = {
    "mixtral": (
        "model.layers.0.input_layernorm.weight", "model.layers.1.self_attn.k_proj.weight", "model.layers.1.block_sparse_moe.gate.weight",
        *(f"model.layers.1.block_sparse_moe.experts.10.w{i}.weight" for i in (1, 2, 3)),
    ),
    "gpt_oss": (
        "model.layers.0.input_layernorm.weight", "model.layers.1.self_attn.k_proj.weight", "model.layers.1.self_attn.k_proj.bias",
        "model.layers.1.self_attn.o_proj.bias", "model.layers.1.self_attn.sinks", "model.layers.2.mlp.router.weight",
        "model.layers.2.mlp.router.bias",
        *(f"model.layers.2.mlp.experts.{name}[10]" for name in ("gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias")),
    ),
    "deepseek_v3": (
        "model.layers.0.input_layernorm.weight", "model.layers.0.mlp.down_proj.weight", "model.layers.1.self_attn.q_a_proj.weight",
        "model.layers.1.self_attn.kv_a_layernorm.weight", "model.layers.1.self_attn.kv_b_proj.weight", "model.layers.2.mlp.gate.weight",
        *(f"model.layers.2.mlp.experts.10.{name}_proj.weight" for name in ("gate", "up", "down")),
        "model.layers.2.mlp.shared_experts.up_proj.weight",
    ),
}  # fmt: skip
EXACT = {"gpt_oss": quantised.rounded_to_mxfp4, "deepseek_v3": quantised.rounded_to_fp8}


def expected(family, model):
    """What goes into expected.npz."""
    tokens = reference.tokens(0, ROWS, LENGTH, families.SIZES["vocab_size"])
    with torch.no_grad():
        single = reference.answers(model, tokens, LENGTHS)
        double = reference.in_float64(family, model, lambda twin: reference.answers(twin, tokens, LENGTHS))
    differ = [name for name in single if name.startswith("experts/") and not torch.equal(single[name], double[name])]
    assert not differ, f"{family}: float32 and float64 choose other experts in {differ}; take another seed"
    found = reference.numpy(single) | {
        "tokens": tokens.astype(np.int32),
        "mask": np.arange(LENGTH) < np.array(LENGTHS)[:, None],
        "logits_noise": furthest(single, double, ("logits",)),
    }
    if family in GRADIENTS:
        names = (*ALWAYS, *GRADIENTS[family])
        loss, single = reference.gradients(model, tokens, LENGTHS)
        _, double = reference.in_float64(family, model, lambda twin: reference.gradients(twin, tokens, LENGTHS))
        single, double = picked(single, names), picked(double, names)
        found |= {f"gradient/{name}": x for name, x in reference.numpy(single).items()}
        found |= {"loss": loss.numpy(), "gradient_noise": furthest(single, double, names)}
    return {name: x.astype(np.int32) if x.dtype == np.int64 else x for name, x in found.items()}


def picked(tensors, names):
    """Those of the names; NAME[i] is entry i of NAME."""
    whole = {name: name.removesuffix("]").split("[") for name in names}
    return {name: tensors[part[0]][int(part[1])] if len(part) > 1 else tensors[part[0]] for name, part in whole.items()}


def furthest(single, double, names):
    return np.float64(max((single[name].double() - double[name]).abs().max().item() for name in names))


def main(*chosen):
    for seed, family in enumerate(families.FAMILIES):
        if chosen and family not in chosen:
            continue
        model, tensors = reference.make(HERE / family, family, seed, EXACT.get(family, lambda tensors: tensors))
        found = expected(family, model)
        np.savez_compressed(HERE / family / "expected.npz", **found)
        layouts.write_others(HERE, family, tensors)
        noise = {name: f"{x:.1e}" for name, x in found.items() if name.endswith("noise")}
        print(f"{family}: logits of deviation {found['logits'].std():.2f}, {noise}")


if __name__ == "__main__":
    main(*sys.argv[1:])
