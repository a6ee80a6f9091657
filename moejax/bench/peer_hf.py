"""Hugging Face's Qwen3-MoE block with each of its backends for experts: blocks for peer_process.py, where torch and transformers are."""

import os

BACKENDS = ("eager", "grouped_mm")
"""Backends for experts that a CPU runs at this size; batched_mm copies a weight for every row."""


def blocks(arrays, settings):
    """A block a backend, with these weights in settings["dtype"]."""
    import torch  # pyright: ignore[reportMissingImports]
    import transformers  # pyright: ignore[reportMissingImports]

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    tensors = {name: torch.from_numpy(a) for name, a in arrays.items()}
    dtype = getattr(torch, settings["dtype"])
    versions = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": torch.get_num_threads(),
    }
    return (
        {f"hf {backend}": _functions(backend, tensors, dtype) for backend in BACKENDS},
        lambda y: y.float().numpy(),
        versions,
    )


def _functions(backend, arrays, dtype):
    """{"forward", "both"}: the block on the given arrays, its output, and its gradients of parameters and input."""
    import torch  # pyright: ignore[reportMissingImports]
    from transformers import Qwen3MoeConfig  # pyright: ignore[reportMissingImports]
    from transformers.models.qwen3_moe import modeling_qwen3_moe  # pyright: ignore[reportMissingImports]

    experts, width, hidden = arrays["up"].shape
    config = Qwen3MoeConfig(
        hidden_size=width, moe_intermediate_size=hidden, num_experts=experts, num_experts_per_tok=int(arrays["top_k"]),
        norm_topk_prob=True,
    )  # fmt: skip
    config._experts_implementation = backend
    block = modeling_qwen3_moe.Qwen3MoeSparseMoeBlock(config)
    with torch.no_grad():
        block.gate.weight.copy_(arrays["router"].T)
        block.experts.gate_up_proj.copy_(torch.cat([arrays["gate"], arrays["up"]], dim=2).transpose(1, 2))
        block.experts.down_proj.copy_(arrays["down"].transpose(1, 2))
    block = block.to(dtype)
    x, dy = arrays["x"].to(dtype).requires_grad_(), arrays["dy"].to(dtype)

    def forward():
        with torch.no_grad():
            return block(x)

    def both():
        x.grad = None
        for parameter in block.parameters():
            parameter.grad = None
        block(x).backward(dy)

    return {"forward": forward, "both": both}
