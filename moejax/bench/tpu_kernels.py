"""The TPU kernels compiled for chips that are not there: memory, code, and how full the compiler keeps the matrix unit.

Nothing is timed and nothing runs on a TPU. Each chip is compiled for in a process of its own, whose PYTHONPATH must have libtpu
(`make tpu`), and reads the compiler's own schedule of the kernel.
"""

from __future__ import annotations

import glob
import importlib.util
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import layout, topologies

from moejax import config, sharding
from moejax import mesh as meshes
from moejax.bench import calls
from moejax.bench.shapes import SHAPES, Shape
from moejax.kernels import chips
from moejax.kernels.grouped_matmul import Groups, pallas_tpu, xla

TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}
QUIET = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
BF16, I32 = jnp.bfloat16, jnp.int32
AGAINST = ("ragged_dot", "megablox", "tokamax")
BESIDE = {"ragged_dot": ("down", "dx", "dw up"), "megablox": ("down",), "tokamax": ("down",)}
"""What of the functions is compiled of others."""
PEER_TILES = (512, 1024, 1024)
"""Rows, contraction, columns: in place of the default of both, 128 of each, whose tiles are too small to fill a matrix unit."""


def run(cfg: config.Config, rounds: int, against: tuple[str, ...] = AGAINST) -> dict[str, Any]:
    """Every function, shape and chip, beside what else there is. `cfg` and `rounds` play no part: a compiler always says the same."""
    asked = [[shape, name, "ours"] for shape in SHAPES for name in calls.FUNCTIONS["tpu"]]
    asked += [[shape, name, who] for shape in SHAPES for who in against for name in BESIDE[who]]
    with ThreadPoolExecutor(min(os.cpu_count() or 1, len(TOPOLOGIES))) as pool:
        rows = [row for found in pool.map(lambda chip: compiled(chip, asked), TOPOLOGIES) for row in found]
    versions = {name: metadata.version(name) for name in ("jax", "jaxlib")}
    return {"command": " ".join(sys.argv), "versions": versions, "rows": rows}


def compiled(chip: str, asked: list[list[str]], schedule: bool = True) -> list[dict[str, Any]]:
    """What a process says that compiles (shape, function, whose) for a chip; with `schedule`, how full its matrix unit is too."""
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | QUIET
        if schedule:
            environment |= {"LIBTPU_INIT_ARGS": f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"}
        command = [sys.executable, "-m", "moejax.bench.tpu_kernels", chip, folder, json.dumps(asked)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"compiling for {chip} failed: {done.stderr[-2000:]}")
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def function(s: Shape, name: str, whose: str, chip: chips.ChipSpec) -> Callable[..., Any]:
    """(arrays, sizes, start) -> outputs."""
    if whose == "ragged_dot":
        own = xla.BACKEND
        return {
            "down": lambda a, z, t: own.matmul(a[:1], a[1:], Groups(z), False, None, BF16),
            "dx": lambda a, z, t: own.matmul(a[:2], a[2:], Groups(z), True, None, BF16),
            "dw up": lambda a, z, t: own.weight_gradient(*a, Groups(z), BF16),
        }[name]
    if whose == "megablox":
        megablox: Any = importlib.import_module("jax.experimental.pallas.ops.tpu.megablox")

        return lambda a, sizes, start: megablox.gmm(*a, sizes, preferred_element_type=BF16, tiling=PEER_TILES)
    if whose == "tokamax":
        # its public function asks which device this machine has
        kernel: Any = importlib.import_module("tokamax._src.ops.ragged_dot.pallas_mosaic_tpu_kernel")
        exact = (jax.lax.Precision.DEFAULT,) * 2
        return lambda a, sizes, start: kernel.gmm(*a, sizes, exact, BF16, tiling=PEER_TILES)
    return calls.function(pallas_tpu, s, name, chip)


def _compile(mesh: jax.sharding.Mesh, s: Shape, name: str, whose: str, chip: chips.ChipSpec) -> tuple[Any, int]:
    """The program of all devices, each with the shape's rows and experts, arrays row-major; and bytes that one device must move."""
    devices = mesh.size

    def make(*shape: int, dtype: Any = BF16) -> jax.ShapeDtypeStruct:
        spec = sharding.spec("expert", *(None,) * (len(shape) - 1))
        form = layout.Format(layout.Layout(tuple(range(len(shape)))), jax.NamedSharding(mesh, spec))
        return jax.ShapeDtypeStruct((devices * shape[0], *shape[1:]), dtype, sharding=form)

    arrays, sizes = calls.arguments(s, name, make), make(s.experts, dtype=I32)
    start = jax.ShapeDtypeStruct((), I32, sharding=jax.NamedSharding(mesh, sharding.spec()))
    part = sharding.spec("expert")
    mapped = jax.shard_map(
        function(s, name, whose, chip),
        mesh=mesh,
        in_specs=(part, part, sharding.spec()),
        out_specs=part,
        check_vma=whose == "ours",
    )
    with jax.set_mesh(mesh):
        outs = jax.eval_shape(mapped, arrays, sizes, start)
        forms = jax.tree.map(lambda o: make(o.shape[0] // devices, *o.shape[1:]).format, outs)
        program = jax.jit(mapped, out_shardings=forms).lower(arrays, sizes, start).compile()
    moved = sum(a.dtype.itemsize * int(np.prod(a.shape)) for a in jax.tree.leaves((arrays, outs))) // devices
    return program, moved


def schedule(folder: str) -> dict[str, Any]:
    """Of the largest kernel in a dump: the share of matrix-unit slots that its innermost loop fills, its spills in all slots of stores,
    and whether it asks which core it is on."""
    found = glob.glob(os.path.join(glob.escape(folder), "*final_hlo-static-per-bundle-utilization.txt"))
    best: dict[str, Any] = {}
    for path in found:
        text = _read(path).splitlines()
        capacity = [int(c) for c in text[2].split()]
        used = [[int(c) for c in line.split()] for line in text[4:] if re.fullmatch(r"\d+( \d+){9}", line.strip())]
        stem = re.match(r"(.*)-\d+-final_hlo-static", path)
        bundles = glob.glob(f"{glob.escape(stem[1])}-*-final_bundles.txt") if stem else []
        bundles = [b for b in bundles if "schedule-analysis" not in b]
        if not bundles or sum(u[0] for u in used) <= best.get("slots", 0):
            continue
        depths = re.findall(r"^\s*0?x?[0-9a-f]+\s+[^{\n]*?(>*) \{", _read(bundles[0]), re.MULTILINE)
        if len(depths) != len(used):
            continue
        deepest = max(len(d) for d, u in zip(depths, used, strict=True) if u[0])
        hot = [u for d, u in zip(depths, used, strict=True) if len(d) == deepest]
        original = glob.glob(f"{glob.escape(stem[1])}-*-original.txt") if stem else []
        core = re.findall(r"(%s\d+) = .*/\* megacore core id \*/", _read(original[0])) if original else []
        best = {
            "slots": sum(u[0] for u in used),
            "hot_bundles": len(hot),
            "matrix_unit": round(sum(u[0] for u in hot) / len(hot) / capacity[0], 3),
            "spills": round(sum(u[8] for u in used) / len(used) / capacity[8], 3),
            "by_core": bool(core) and _read(original[0]).count(f", {core[0]}\n") > 0,
        }
    best.pop("slots", None)
    return best


def _read(path: str) -> str:
    return pathlib.Path(path).read_text()


def _row(mesh: jax.sharding.Mesh, chip: str, folder: str, shape: str, name: str, whose: str) -> dict[str, Any]:
    row: dict[str, Any] = {"chip": chip, "shape": shape, "function": name, "whose": whose}
    if whose == "tokamax" and importlib.util.find_spec("tokamax") is None:
        return row | {"error": "not installed"}
    spec = chips.CHIPS[chip]
    for path in glob.glob(os.path.join(glob.escape(folder), "*")):
        os.remove(path)
    try:
        program, moved = _compile(mesh, SHAPES[shape], name, whose, spec)
    except Exception as error:  # a peer's failure is a finding
        return row | {"error": f"{type(error).__name__}: {str(error)[:200]}"}
    memory = program.memory_analysis()
    row |= {
        "temp_bytes": memory.temp_size_in_bytes,
        "code_bytes": memory.generated_code_size_in_bytes,
        "roofline_ms": 1e3 * max(calls.flops(SHAPES[shape], name) / spec.flops, moved / spec.bandwidth),
    }
    return row | schedule(folder)


def table(result: dict[str, Any]) -> str:
    """The numbers for a person."""
    lines = [
        f"{'chip':6} {'shape':14} {'function':9} {'whose':11} {'temp MB':>9} {'code KB':>8} {'matrix unit':>11} {'spills':>7} by core"
    ]
    for r in result["rows"]:
        head = f"{r['chip']:6} {r['shape']:14} {r['function']:9} {r['whose']:11} "
        if "error" in r:
            lines.append(head + r["error"])
            continue
        full, spills = (f"{100 * r[key]:.0f} %" if key in r else "-" for key in ("matrix_unit", "spills"))
        lines.append(
            head
            + f"{r['temp_bytes'] / 1e6:9.2f} {r['code_bytes'] / 1e3:8.0f} {full:>11} {spills:>7} {r.get('by_core', '-')}"
        )
    return "\n".join(lines)


def main(chip: str, folder: str, asked: str) -> None:
    """Compiles what is asked, a line of JSON for each."""
    devices = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[chip]).devices
    mesh = meshes.make(config.Mesh(expert=len(devices)), devices)
    for shape, name, whose in json.loads(asked):
        print(json.dumps(_row(mesh, chip, folder, shape, name, whose)), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
