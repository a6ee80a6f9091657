"""Small steps that tests/aot/test_plan.py compiles, and what is kept of six of them.

python tests/aot/planned.py NAME …     writes tests/aot/goldens/NAME.txt anew (with libtpu: make tpu), all of GOLDEN without a name
"""

import concurrent.futures
import pathlib
import sys

from moejax import config
from moejax.plan import aot, memory, sends
from moejax.train import check

FOLDER = pathlib.Path(__file__).parent / "goldens"
MODEL = {
    "width": 512, "heads": 8, "kv_heads": 4, "head_dim": 64, "hidden": 1024, "vocab_size": 1024, "loss_chunk": 512, "repeats": 3,
    "compute_dtype": "bfloat16", "remat": "full",
}  # fmt: skip
MOE = {"num_experts": 8, "top_k": 2, "hidden": 512, "transport": "ragged", "kernel": "pallas_tpu"}
DATA = {"context": 256, "batch": 16}


def case(topology, mesh, step="train", slices=1, model=(), moe=(), data=(), train=()):
    """A request: MODEL, MOE and DATA with changes."""
    own = config.Model(**MODEL | dict(model), moe=config.MoE(**MOE | dict(moe)))
    cfg = config.Config(
        model=own, mesh=config.Mesh(**mesh), data=config.Data(**DATA | dict(data)), train=config.Train(**dict(train))
    )
    check.check(cfg)
    return aot.Request(cfg, topology, slices, step)


CASES = {
    "dense": case(
        "v5e:2x2", {"fsdp": 4}, model={"pattern": ("attention+dense",), "remat": "selective"}, data={"context": 1024, "batch": 32}
    ),
    "ragged": case("v5p:2x2x2", {"fsdp": 2, "expert": 4}),
    # Where all is saved the compiler makes scores twice rather than keep them; beside wide experts that is little.
    "gather": case(
        "v6e:2x2", {"expert": 4}, moe={"transport": "gather", "shared_hidden": 512, "hidden": 1024}, model={"remat": "none"}
    ),
    "scatter": case(
        "v5p:2x2x2", {"fsdp": 2, "expert": 2, "tensor": 2}, moe={"transport": "scatter", "capacity_factor": 1.25}
    ),
    "latent": case(
        "v5p:2x2x2", {"expert": 8}, model={
            "first": ("latent+dense",), "pattern": ("latent+sparse",), "further": 1,
            "latent": config.Latent(query_rank=256, rank=128, nope=64, rope=32, value=64), "query_chunk": 128,
        },
    ),
    "microbatches": case("v5e:2x2", {"fsdp": 2, "expert": 2}, train={"microbatches": 2}),
    "slices": case("v5e:2x2", {"data": 2, "fsdp": 4}, slices=2),
    "windows": case(
        "v6e:2x4", {"expert": 2, "tensor": 2, "context": 2}, step="eval", model={
            "pattern": ("local+sparse", "attention+dense"), "local": config.Attention(window=64, sinks=True, bias=True),
        },
    ),
    "prefill": case("v5p:2x2x1", {"expert": 4}, step="prefill"),
    "decode": case("v5e:2x2", {"fsdp": 2, "expert": 2}, step="decode", moe={"transport": "gather"}),
}  # fmt: skip
TRAINING = tuple(name for name, request in CASES.items() if request.step == "train")
GOLDEN = ("dense", "ragged", "scatter", "latent", "slices", "decode")


def compiled(names):
    """What the compiler says of these cases, two at a time."""
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        return dict(zip(names, pool.map(lambda name: aot.compiled(CASES[name], None), names), strict=True))


def text(name, found):
    """Of a compiled case, for people to read what changed."""
    request = CASES[name]
    mesh = " ".join(f"{axis}={n}" for axis, n in vars(request.config.mesh).items() if n > 1)
    slices = f" x {request.slices} slices" if request.slices > 1 else ""
    lines = [
        f"{name}: {request.step} step on {request.topology}{slices}, {mesh}",
        f"arguments {found['memory']['arguments']:,} bytes a device, outputs {found['memory']['outputs']:,}",
        f"products {found['flops']['products']:,} FLOPs, kernels {found['flops']['kernels']:,}",
        *(f"{times:4} x {scope}" for scope, times in sorted(found["kernels"].items())),
    ]
    lines += [
        f"{c['kind']:<18} {sends.named(c):<14} {c['times']:>4} times, {c['apart']:>4} apart  {c['bytes']:>14,} bytes"
        for c in found["collectives"]
    ]
    return "\n".join(lines) + "\n"


def wire(rows):
    """Bytes that a device sends, by kind and axes. A sum counts half, under reduce-scatter: where every device keeps a piece, the
    compiler may sum the whole."""
    found = {}
    for row in rows:
        whole = row["kind"] == "all-reduce"
        key = "reduce-scatter" if whole else row["kind"], "+".join(row["axes"])
        found[key] = found.get(key, 0) + row["wire"] / (1 + whole)
    return found


def argument_bytes(name):
    """By the plan, which does not compile. What a device has and the step does not read is no argument of its program: moments in an
    evaluation, the unembedding in serving, where logits are a program of their own."""
    cfg, step = CASES[name].config, CASES[name].step
    unread = {"eval": "optimizer", "prefill": "unembedding", "decode": "unembedding"}.get(step)
    read = (x for x in memory.lying(cfg, step) if unread not in (x.kind, *x.path))
    return sum(memory.padded_bytes(x.local(cfg.mesh), x.dtype) for x in read)


if __name__ == "__main__":
    asked = tuple(sys.argv[1:]) or GOLDEN
    FOLDER.mkdir(exist_ok=True)
    for name, found in compiled(asked).items():
        (FOLDER / f"{name}.txt").write_text(text(name, found))
        print(text(name, found))
