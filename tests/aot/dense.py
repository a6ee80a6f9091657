"""A training step compiled for a TPU topology: its collectives, and the sizes of its dense weights. Run by test_dense.

python dense.py '[{"topology": "v5p:4x4x4", "mesh": {"data": 4, "fsdp": 4, "expert": 4}, "model": {"remat": "full"}}]'
"""

import json
import math
import sys

import compiled  # first: it says what JAX may touch
import jax

from moejax import config, sharding
from moejax.plan import hlo, programs, sends

MODEL = {
    "width": 1024, "heads": 8, "kv_heads": 4, "head_dim": 64, "hidden": 1024, "vocab_size": 4096, "loss_chunk": 1024, "repeats": 2,
    "first": ("attention+dense",), "pattern": ("attention+sparse",), "compute_dtype": "bfloat16", "remat": "full",
}  # fmt: skip
MOE = {
    "num_experts": 16,
    "top_k": 2,
    "hidden": 256,
    "shared_hidden": 512,
    "transport": "scatter",
    "capacity_factor": 1.25,
}


def answer(case):
    """{"sent": [kind, axes, dtype, bytes, times, scope] of every collective, "dense": {path: numbers in a weight that is stored in pieces},
    "wire": bytes that a device sends, "temporary": bytes}."""
    model = config.Model(**MODEL | case.get("model", {}), moe=config.MoE(**MOE))
    data = config.Data(context=256, batch=math.prod(case["mesh"].values()))
    cfg, on = config.Config(model=model, mesh=config.Mesh(**case["mesh"]), data=data), compiled.mesh_of(case)
    with jax.set_mesh(on):
        step = programs.build("train", cfg, on)
        made = step.step.lower(*step.arguments).compile()
    found = sends.of(hlo.Module(made.as_text()), dict(on.shape))
    stored = sharding.axes("storage")
    weights = jax.tree_util.tree_flatten_with_path(step.arguments[0].parameters)[0]
    dense = {jax.tree_util.keystr(path): math.prod(x.shape) for path, x in weights if stored in x.sharding.spec}
    return {
        "sent": [[s.kind, s.axes, s.dtype, s.bytes, s.times, s.scope] for s in found],
        "dense": dense,
        "wire": sum(s.wire for s in found),
        "temporary": made.memory_analysis().temp_size_in_bytes,
    }


if __name__ == "__main__":
    print(json.dumps([answer(case) for case in json.loads(sys.argv[1])]))
