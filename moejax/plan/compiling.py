"""Compiles one step for a TPU topology, in a process of its own: it must be told before jax starts that no TPU is there.

echo '{"config": {…}, "topology": "v5p:2x2x2", "slices": 1, "step": "train"}' | python -m moejax.plan.compiling
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
from typing import Any

os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}

import jax
from jax.experimental import topologies

from moejax import config
from moejax import mesh as meshes
from moejax.errors import ConfigError, UserError
from moejax.plan import dots, hardware, hlo, programs, sends, traced
from moejax.train import check

FULL = re.compile(r"(?:Used|temporaries \()\s*([\d.]+)([KMGT]?)\)? (?:of|exceeds available HBM \()\s*([\d.]+)([KMGT]?)")
"""What the compiler says of a program that is too large; of one with too large temporaries it names only these."""
UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def compiled(request: dict[str, Any]) -> dict[str, Any]:
    """What a compiled step takes, sends and computes, on one device. Raises ConfigError for a mesh that the topology does not have."""
    cfg = config.from_dict(request["config"])
    check.check(cfg)
    mesh = meshes.make(cfg.mesh, devices(request["topology"], request["slices"]))
    with jax.set_mesh(mesh):
        started = time.monotonic()
        program = programs.build(request["step"], cfg, mesh)
        executed = traced.executed(program.step, *program.arguments)
        lowered = program.step.lower(*program.arguments)
        lowering, started = time.monotonic() - started, time.monotonic()
        facts: dict[str, Any] = {
            "devices": mesh.size,
            "device_kind": mesh.devices.flat[0].device_kind,
            "tokens": program.tokens,
            "executed_flops": executed.flops,
            "open_loops": executed.open_loops,
            "argument_bytes": programs.bytes_of(program),
            "lower_seconds": round(lowering, 1),
        }
        try:
            made = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            if (full := FULL.search(str(error))) is None:
                raise
            used, room = (float(full[i]) * UNITS[full[i + 1]] for i in (1, 3))
            return facts | {"fits": False, "memory": {"used": int(used), "room": int(room)}}
    seconds = round(time.monotonic() - started, 1)
    return (
        facts
        | {"fits": True, "compile_seconds": seconds, "memory": memory(made)}
        | read(made.as_text(), dict(mesh.shape), request["slices"])
    )


def devices(topology: str, slices: int) -> Any:
    """Of a topology by its name, on one slice or several. Raises UserError for one that the compiler does not know."""
    configuration = hardware.parse_topology(topology).chip.configuration
    options = {"num_slices": slices} if slices > 1 else {}
    options |= {"chip_config_name": configuration} if configuration else {}
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=topology, **options).devices
    except (jax.errors.JaxRuntimeError, RuntimeError, ValueError) as error:
        raise UserError(f"--topology={topology}: {' '.join(str(error).split())[:300]}") from error


def memory(made: Any) -> dict[str, int]:
    """Bytes of one device. `used` is all of them at once: what is donated is counted once, and given apart."""
    stats = made.memory_analysis()
    parts = {
        "arguments": stats.argument_size_in_bytes,
        "outputs": stats.output_size_in_bytes - stats.alias_size_in_bytes,
        "temporaries": stats.temp_size_in_bytes,
        "code": stats.generated_code_size_in_bytes,
    }
    return parts | {"used": sum(parts.values()), "donated": stats.alias_size_in_bytes}


def read(text: str, mesh: dict[str, int], slices: int = 1) -> dict[str, Any]:
    """Products, kernels and collectives of a compiled program's text, on a mesh over so many slices."""
    module = hlo.Module(text)
    products = dots.of(module)
    return {
        "flops": {"products": products.products, "kernels": products.kernels, "total": products.total},
        "kernels": dots.kernels(module),
        "kernels_without_estimate": list(products.without_estimate),
        "collectives": sends.summed(sends.of(module, mesh, slices)),
    }


def main() -> None:
    """Answers on the last line of standard output: facts, or an error to be said in one line."""
    try:
        answer = compiled(json.load(sys.stdin))
    except (ConfigError, UserError) as error:
        answer = {"error": str(error)}
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
