"""What converting a published checkpoint costs: memory beside the arrays that are made, and speed beside reading the files alone.

The checkpoint is made up: right names and shapes, random finite numbers, shards of a gigabyte. Every measurement is a process of its own
(convert_process.py) that finds none of the files in memory.
"""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from moejax import config
from moejax import mesh as meshes
from moejax.bench import timing
from moejax.checkpoint.hugging_face import outline, save, shards
from moejax.checkpoint.hugging_face.families import FAMILIES
from moejax.errors import UserError
from moejax.train import starts, state

DEFAULT = config.Config(
    model=config.Model(
        vocab_size=32768, width=2048, heads=16, kv_heads=4, head_dim=128, rope_theta=1e6, loss_chunk=8192,
        attention=config.Attention(norm="head"),
        moe=config.MoE(num_experts=64, top_k=8, hidden=768, load_balance=0.0, router_z=0.0),
    )
)  # fmt: skip
"""A layer of Qwen3-30B-A3B with half its experts; as many layers as make up the size."""


class Setting(NamedTuple):
    """One checkpoint and what is done with it."""

    kind: str
    """stream: into arrays; begin: into step 0 of a run, as scripts/convert.py does."""
    stored: str
    made: str
    gigabytes: float
    """Of the files, at least."""


SETTINGS = (
    Setting("stream", "bfloat16", "bfloat16", 8.0),
    Setting("stream", "float32", "float32", 8.0),
    Setting("stream", "bfloat16", "float32", 4.0),
    Setting("begin", "float32", "float32", 2.0),
)
"""Parameters of a run are float32, so the third is the first half of what scripts/convert.py does with a checkpoint in bf16. The fourth
is all of it: moments are made, and the state is written."""
SHARD = 10**9
POOL = 2**26
"""Random bytes that all tensors are cut from."""
ROOM = 5e9
"""Bytes that must be free beside the arrays of a setting."""
STATES = {"stream": 1, "begin": 3}
"""Arrays by parameters: a run has two moments of each."""


def run(cfg: config.Config, rounds: int) -> dict[str, Any]:
    """Gigabytes and seconds of every setting, `rounds` processes each, reading and converting in turn."""
    return {
        "machine": timing.machine(),
        "rounds": rounds,
        "settings": [_measured(cfg, setting, rounds) for setting in SETTINGS],
    }


def _measured(cfg: config.Config, setting: Setting, rounds: int) -> dict[str, Any]:
    model = of_size(cfg.model, setting)
    stored, made = (_numbers(model) * np.dtype(kind).itemsize for kind in (setting.stored, setting.made))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "published"
        require_room(Path(name), stored + 3 * made, made * STATES[setting.kind] + ROOM)
        write(folder, model, setting.stored)
        answers: dict[str, list[dict[str, Any]]] = {"read": [], setting.kind: []}
        for turn in range(rounds):
            for kind in list(answers)[:: 1 if turn % 2 else -1]:
                answers[kind].append(_asked(kind, folder, setting.made))
                shutil.rmtree(folder.with_name("run"), ignore_errors=True)
        files = sorted(folder.glob("*.safetensors"), key=lambda file: file.stat().st_size)
        facts = {"shards": len(files), "largest_shard_gb": round(files[-1].stat().st_size / 1e9, 3)}
    return (
        setting._asdict() | {"layers": config.depth(model)} | facts | _summary(answers["read"], answers[setting.kind])
    )


def _asked(kind: str, folder: Path, made: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "moejax.bench.convert_process", kind, str(folder), made]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise UserError(
            f"the process that should {kind} ended with code {done.returncode}: {done.stderr.strip()[-300:]}"
        )
    return json.loads(done.stdout)


def _summary(read: list[dict[str, Any]], made: list[dict[str, Any]]) -> dict[str, Any]:
    """Rates are medians of the rounds, memory is the most of any."""
    rate = lambda answers: round(float(np.median([a["bytes"] / a["seconds"] for a in answers])) / 1e9, 3)  # noqa: E731
    most = lambda name: round(max(a[name] for a in made) / 1e9, 3)  # noqa: E731
    return {
        "files_gb": round(made[0]["bytes"] / 1e9, 3),
        "arrays_gb": most("arrays"),
        "largest_array_gb": most("largest"),
        "peak_gb": most("peak"),
        "peak_beside_arrays_gb": round(max(a["peak"] - a["arrays"] for a in made) / 1e9, 3),
        "peak_of_private_memory_gb": most("anonymous"),
        "peak_of_mapped_files_gb": most("mapped"),
        "of_that_before_gb": most("before"),
        "new_memory_gb_per_second": round(float(np.median([a["touched"] for a in read])), 3),
        "read_gb_per_second": rate(read),
        "converted_gb_per_second": rate(made),
        "share_of_reading": round(rate(made) / rate(read), 3),
        "files_not_in_memory": all(a["cold"] for a in (*read, *made)),
    }


def of_size(model: config.Model, setting: Setting) -> config.Model:
    """The model with as many blocks as make up the setting's size."""
    one, two = (_numbers(dataclasses.replace(model, repeats=n)) for n in (1, 2))
    wanted = setting.gigabytes * 1e9 / np.dtype(setting.stored).itemsize
    return dataclasses.replace(model, repeats=max(1, math.ceil((wanted - one) / (two - one)) + 1))


def _numbers(model: config.Model) -> int:
    return sum(math.prod(leaf.shape) for leaf in leaves(model).values())


def leaves(model: config.Model) -> dict[str, jax.ShapeDtypeStruct]:
    """What its published tensors become, on one device."""
    mesh = meshes.make(config.Mesh(), jax.devices()[:1])
    return starts.leaves_of_published(state.build(config.Config(model=model), mesh))


def write(folder: Path, model: config.Model, stored: str) -> None:
    """A published checkpoint of the model, of numbers between -2 and 2. Raises ConfigError where no family has such a model."""
    family, kind = next(iter(save.fitting(model)), "mixtral"), save.DTYPES[stored]
    tree = save.describe(model, family)
    sizes = outline.shapes(FAMILIES[family].rules(model), leaves(model))
    make = _numbers_of(kind, max(map(math.prod, sizes.values())))
    described = {name: (shape, kind) for name, shape in sizes.items()}
    shards.write(folder, described, lambda name: make(sizes[name]), tree, shard_bytes=SHARD)


def _numbers_of(kind: np.dtype, most: int) -> Callable[[tuple[int, ...]], np.ndarray]:
    """Random arrays with up to so many entries: the exponent's highest bit is 0, which makes every number finite."""
    words = np.dtype(f"u{kind.itemsize}")
    pool = np.frombuffer(np.random.default_rng(0).bytes(POOL), words) & ~words.type(1 << (8 * kind.itemsize - 2))
    pool = np.resize(pool, max(most, pool.size)).view(kind)
    return lambda shape: pool[: math.prod(shape)].reshape(shape)


def require_room(folder: Path, disk: int | float, memory: int | float) -> None:
    """Raises UserError where a measurement would fill the disk or make the machine swap."""
    free = shutil.disk_usage(folder).free
    if free < disk * 1.1:
        raise UserError(
            f"{folder} has {free / 1e9:.1f} GB free, this takes {disk * 1.1 / 1e9:.1f}; set TMPDIR to a larger disk"
        )
    with open("/proc/meminfo") as lines:
        available = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    if available < memory:
        raise UserError(
            f"{available / 1e9:.1f} GB of memory are available, this takes {memory / 1e9:.1f}; end something else"
        )


def table(result: dict[str, Any]) -> str:
    """A line for each setting."""
    lines = ["       files               arrays              peak beside  private     mapped   read        converted"]
    for row in result["settings"]:
        lines.append(
            f"{row['kind']:6} {row['files_gb']:6.2f} GB {row['stored']:8}  {row['arrays_gb']:6.2f} GB {row['made']:8} "
            f"{row['peak_beside_arrays_gb']:6.2f} GB  {row['peak_of_private_memory_gb']:6.2f} GB {row['peak_of_mapped_files_gb']:5.2f} GB "
            f"{row['read_gb_per_second']:5.2f} GB/s {row['converted_gb_per_second']:5.2f} GB/s"
        )
    return "\n".join(lines)
