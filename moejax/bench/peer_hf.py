"""Hugging Face's Qwen3-MoE block, run by an interpreter that has torch and transformers and need not have this library.

python peer_hf.py INPUTS.npz DTYPE: says hello on its output, then does what each line of its input asks, one JSON object a line.
"""

import json
import os
import sys
import time

del sys.path[0]  # this folder: it has a statistics.py too

import numpy as np  # noqa: E402

BACKENDS = ("eager", "grouped_mm")
"""Backends for experts that a CPU runs at this size; batched_mm copies a weight for every row."""


def main(inputs, dtype):
    """Answers until its input ends."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever libraries print is not an answer

    def say(answer):
        print(json.dumps(answer), file=out, flush=True)

    import torch  # pyright: ignore[reportMissingImports]
    import transformers  # pyright: ignore[reportMissingImports]

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    arrays = {name: torch.from_numpy(a) for name, a in np.load(inputs).items()}
    calls = {f"hf {backend}": functions(backend, arrays, getattr(torch, dtype)) for backend in BACKENDS}
    for functions_of in calls.values():  # the first call of each is not like the others
        for call in functions_of.values():
            call()
    versions = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": torch.get_num_threads(),
    }
    say({"versions": versions, "names": list(calls)})
    for line in sys.stdin:
        asked = json.loads(line)
        call = calls[asked["name"]]
        if asked["kind"] == "output":
            file = os.path.join(os.path.dirname(inputs), "output.npy")
            np.save(file, call["forward"]().float().numpy())
            say({"file": file})
            continue
        began = time.perf_counter()
        call[asked["kind"]]()
        say({"seconds": time.perf_counter() - began})


def functions(backend, arrays, dtype):
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


if __name__ == "__main__":
    main(*sys.argv[1:])
