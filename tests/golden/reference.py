"""The published implementations (transformers on torch), in the plainest form they have: random models, and what these answer."""

import pathlib

import numpy as np
import torch
import transformers
from golden import families
from safetensors.torch import save_file
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree
from transformers.core_model_loading import revert_weight_conversion

PLAIN = {"attn_implementation": "eager", "experts_implementation": "eager"}
FULL = ("e_score_correction_bias",)
"""Tensors that are published in float32."""


SPREAD = {
    "gate.weight": 2.0,
    "router.weight": 2.0,
    "experts.gate_up_proj": 2.0,
    "experts.down_proj": 0.5,
    "lm_head.weight": 0.5,
}
"""Factors on the deviation that keeps a vector's length: routers that decide, activations that reach their limit, small logits."""


def config(family, **other):
    """The family's tiny config, with `other` values in place of its own."""
    stem, values = families.FAMILIES[family]
    kind = getattr(transformers, "Llama4TextConfig" if stem == "Llama4" else f"{stem}Config")
    return kind(**families.SIZES | values | other)


def model_class(family):
    return getattr(transformers, f"{families.FAMILIES[family][0]}ForCausalLM")


def build(family, wanted, dtype=torch.float32):
    """A model of that config with transformers' own first weights."""
    return model_class(family)._from_config(wanted, dtype=dtype, **PLAIN).eval()


def published(model, tensors):
    """Tensors by the names of the module -> by the names on disk, experts one by one where the family is published so."""
    return {name: x.contiguous() for name, x in revert_weight_conversion(model, dict(tensors)).items()}


def draw(shapes, seed):
    """Random values for every tensor, norms, biases and buffers too, that bfloat16 holds exactly. {name: tensor}"""
    rng = torch.Generator().manual_seed(seed)
    return {name: _one(name, shapes[name], rng).bfloat16() for name in sorted(shapes)}


def _one(name, shape, rng):
    x = torch.randn(shape, generator=rng)
    if name.endswith("norm.weight"):
        return 1 + 0.2 * x
    if name.endswith(FULL):
        return 0.05 * x
    if name.endswith("sinks") or "embed_tokens" in name:
        return x
    if name.endswith(("bias", "gate_up_proj_bias", "down_proj_bias")):
        return 0.2 * x
    wide = next((factor for end, factor in SPREAD.items() if name.endswith(end)), 1.0)
    fused = name.endswith(
        ("experts.gate_up_proj", "experts.down_proj")
    )  # [E, in, out]; a linear layer's weight is [out, in]
    return wide * x / shape[-2 if fused else -1] ** 0.5


def write(folder, family, wanted, tensors):
    """`config.json` and `model.safetensors` of these values, as the family is published."""
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    wanted.architectures, wanted.dtype = [model_class(family).__name__], torch.bfloat16
    wanted.save_pretrained(folder)
    if family == "kimi_k2":
        path = folder / "config.json"
        path.write_text(path.read_text().replace('"model_type": "deepseek_v3"', '"model_type": "kimi_k2"'))
    stored = {name: x.float() if name.endswith(FULL) else x for name, x in tensors.items()}
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})


def read(folder, family):
    """The model of a folder in float32; every tensor is taken and none is missing."""
    kind = type(config(family))
    found = kind.from_pretrained(folder)
    found.model_type = kind.model_type  # transformers has no class for kimi_k2 and would not know its layout
    model, report = model_class(family).from_pretrained(
        folder, config=found, dtype=torch.float32, output_loading_info=True, **PLAIN
    )
    assert not any(report.values()), report
    return model.eval()


def make(folder, family, seed, change=lambda tensors: tensors, **other):
    """A random model written to a folder and read back by transformers. (model, {name on disk: tensor})"""
    wanted = config(family, **other)
    empty = build(family, wanted)
    tensors = change(draw({name: x.shape for name, x in published(empty, empty.state_dict()).items()}, seed))
    write(folder, family, wanted, tensors)
    return read(folder, family), tensors


class Double(TorchFunctionMode):
    """Runs the models' own code in float64: what asks for float32 gets float64."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        args, kwargs = _pytree.tree_map(lambda a: torch.float64 if a is torch.float32 else a, (args, kwargs or {}))
        return (torch.Tensor.double if func is torch.Tensor.float else func)(*args, **kwargs)


def answers(model, ids, lengths):
    """What the model says of `ids` [B, T] of which the first `lengths` [B] of a row are valid, its rows padded on the right.

    {"logits": [N, V] of the N valid positions, row by row; "experts/L" and "weights/L": [N, K] of sparse layer L, by falling weight}
    """
    valid = torch.arange(ids.shape[1])[None] < torch.as_tensor(lengths)[:, None]
    found, hooks = {}, []
    for name, module in model.named_modules():
        if type(module).__name__.endswith(("Router", "TopkRouter")):
            layer = name.split("layers.")[1].split(".")[0]
            hooks.append(
                module.register_forward_hook(lambda m, _, out, layer=layer: found.update(_routed(m, out, layer, valid)))
            )
    logits = model(input_ids=torch.as_tensor(ids), attention_mask=valid.long(), use_cache=False).logits
    for hook in hooks:
        hook.remove()
    return {"logits": logits[valid], **found}


def _routed(module, out, layer, valid):
    if len(out) == 3:
        _, weights, experts = out
    else:  # Llama 4: scores of all experts, zero where not chosen
        weights, experts = torch.topk(out[0], module.top_k, dim=-1)
    weights, order = torch.sort(weights, dim=-1, descending=True, stable=True)
    keep = valid.reshape(-1)
    return {f"experts/{layer}": experts.gather(1, order)[keep], f"weights/{layer}": weights[keep]}


def cross_entropy(model, ids, lengths):
    """Mean over the valid targets: the next token of every valid position but a row's last."""
    ids = torch.as_tensor(ids)
    valid = torch.arange(ids.shape[1])[None] < torch.as_tensor(lengths)[:, None]
    logits = model(input_ids=ids, attention_mask=valid.long(), use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits[:, :-1][valid[:, 1:]], ids[:, 1:][valid[:, 1:]])


def gradients(model, ids, lengths):
    """(loss, {name on disk: gradient of the loss})."""
    model.zero_grad()
    loss = cross_entropy(model, ids, lengths)
    loss.backward()
    held = {name: p.grad for name, p in model.named_parameters()}
    return loss.detach(), published(model, held)


def in_float64(family, model, function):
    """`function(model)` of the same model in float64."""
    with Double():
        twin = build(family, type(model.config)(**model.config.to_dict()), dtype=torch.float64)
        twin.load_state_dict(model.state_dict())
        return function(twin)


def numpy(tensors):
    return {name: x.detach().numpy() for name, x in tensors.items()}


def tokens(seed, rows, length, vocabulary):
    """[rows, length]"""
    return np.random.default_rng(seed).integers(vocabulary, size=(rows, length))
