"""Times parts of the library against what they should be compared with, in turn within one run.

    block        the whole sparse block against --against: dense, ragged_dot, hf (with --torch=PYTHON)
    gpu_kernels  the Hopper kernels on an NVIDIA GPU: TFLOP/s beside ragged_dot, tokamax and a dense matmul
    tpu_kernels  the TPU kernels compiled for four chips: memory, code, the compiler's schedule (needs libtpu; an hour)
    layer        the sparse layer against the dense twin of equal active FLOPs and against its own matmuls
    experts      the train step with 1 to 64 experts at equal active FLOPs against the dense twin's
    coordinates  activations and their changes along widths and experts, with rules of transfer and without (half an hour)
    routers      every router in the default experiment, cut short: loss, drops, load (half an hour)
    balancers    every balancer: steps to even out a skewed router, loss at equal budget, overhead (half an hour)
    statistics   the train step with its statistics against the step without
    convert      published checkpoints of 8 GB into arrays: memory beside these, speed beside reading (20 GB of disk; --rounds=3)
    pods         published models compiled for TPU slices: the table of docs/pods.md (needs libtpu; two hours, kept answers are read again)
    saves        steps beside an asynchronous save against steps without one
    meshes       the experiment on one device, six meshes and two processes: losses and flipped assignments (half an hour)
    transport    every transport on eight devices: time, bytes, drops and rounds, by experts, their spread and the routing

Example: python scripts/bench.py layer --config=configs/tiny.py --json
"""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from types import ModuleType
from typing import Any

from absl import flags

from moejax import cli, config, memory
from moejax.bench import (
    balancers,
    block,
    convert,
    coordinates,
    experts,
    gpu_kernels,
    layer,
    meshes,
    pods,
    routers,
    saves,
    statistics,
    tpu_kernels,
    transport,
)
from moejax.errors import UserError
from moejax.train import check

CONFIG = cli.config_flag()
JSON = flags.DEFINE_bool("json", False, "print the numbers as JSON")
ROUNDS = flags.DEFINE_integer("rounds", 30, "times each function is run", lower_bound=1)

PICTURE = flags.DEFINE_string("picture", None, "file for the bench's picture, a PNG (meshes, coordinates, experts)")

AGAINST = flags.DEFINE_list("against", None, "what to compare with (block): a list")
TORCH = flags.DEFINE_string("torch", None, "a Python interpreter that has torch and transformers (block)")

BENCHES = {
    "block": block,
    "convert": convert,
    "coordinates": coordinates,
    "experts": experts,
    "gpu_kernels": gpu_kernels,
    "tpu_kernels": tpu_kernels,
    "layer": layer,
    "meshes": meshes,
    "pods": pods,
    "routers": routers,
    "saves": saves,
    "balancers": balancers,
    "statistics": statistics,
    "transport": transport,
}


def main(names: list[str]) -> None:
    if len(names) != 1 or names[0] not in BENCHES:
        raise UserError(f"name one bench of: {', '.join(BENCHES)}; for example python scripts/bench.py layer")
    bench = BENCHES[names[0]]
    cfg = getattr(bench, "DEFAULT", config.Config()) if CONFIG.value is None else cli.resolved(CONFIG)
    check.check(cfg)
    memory.keep_freed()
    if PICTURE.value is not None and not hasattr(bench, "draw"):
        raise UserError(f"--picture={PICTURE.value}: bench {names[0]} draws none; leave it out")
    result = bench.run(cfg, ROUNDS.value, **_peers(names[0], bench))
    if PICTURE.value is not None:
        Path(PICTURE.value).expanduser().write_bytes(bench.draw(result))
    print(json.dumps(result, indent=1) if JSON.value else bench.table(result))


def _peers(name: str, bench: ModuleType) -> dict[str, Any]:
    """What of --against and --torch was given, for a bench that takes it."""
    against = None if AGAINST.value is None else tuple(AGAINST.value)
    given = {key: value for key, value in (("against", against), ("torch", TORCH.value)) if value is not None}
    for key in given:
        if key not in inspect.signature(bench.run).parameters:
            raise UserError(f"--{key}: bench {name} does not take it; leave it out")
    unknown = [peer for peer in against or () if peer not in bench.AGAINST]
    if unknown:
        raise UserError(f"--against: {unknown[0]!r} is not one of {', '.join(bench.AGAINST)}")
    return given


if __name__ == "__main__":
    cli.run(main, rest="names")
