"""What a run is and what it runs on: a line for people, run.json for programs."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import math
import platform
from pathlib import Path
from typing import Any

import jax

import moejax
from moejax import config, sharding
from moejax import mesh as meshes
from moejax.data.pipeline import Rows
from moejax.kernels.grouped_matmul import pick
from moejax.layers import kinds
from moejax.moe import visits, widths
from moejax.moe.transport import ragged
from moejax.train import state

PACKAGES = ("moejax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


def line(cfg: config.Config, mesh: jax.sharding.Mesh) -> str:
    """The resolved plan, as in `capacity 1.25 · scatter transport over expert=4 · grouped_matmul=blocked · …`."""
    parts = [meshes.describe(mesh)]
    moe = cfg.model.moe
    if kinds.number(cfg.model, "sparse"):
        capacity = "dropless" if moe.capacity_factor is None else f"capacity {moe.capacity_factor:g}"
        parts += [
            f"{moe.router} {moe.top_k} of {moe.num_experts}",
            capacity,
            f"{moe.transport} transport over {_experts(cfg)}",
            *_visits(cfg),
            *([f"in {moe.chunks} chunks"] if moe.chunks > 1 else []),
            *_buffer(cfg),
            f"grouped_matmul={pick(moe.kernel)}",
        ]
    parts += [cfg.model.compute_dtype, f"remat {cfg.model.remat}", f"{cfg.train.microbatches} microbatch(es)"]
    return " · ".join(parts)


def _experts(cfg: config.Config) -> str:
    """`expert=4`, or `expert=4 tensor=2` where experts lie over both."""
    axes = sharding.axes(sharding.LAYOUTS[cfg.model.moe.tensor].expert)
    return " ".join(f"{a}={getattr(cfg.mesh, a)}" for a in axes if a == axes[0] or getattr(cfg.mesh, a) > 1)


def _buffer(cfg: config.Config) -> list[str]:
    """What an exchange in rounds has room for."""
    moe, model = cfg.model.moe, cfg.model
    if moe.transport != "ragged":
        return []
    shards = math.prod(getattr(cfg.mesh, axis) for axis in sharding.axes(sharding.LAYOUTS[moe.tensor].expert))
    devices = math.prod(getattr(cfg.mesh, axis) for axis in sharding.axes(sharding.LAYOUTS[moe.tensor].shard))
    rows = cfg.data.batch * cfg.data.context * moe.top_k // (devices * cfg.train.microbatches * moe.chunks)
    itemsize = 4 if model.compute_dtype == "float32" else 2
    width, hidden = moe.latent or model.width, max(widths.of_classes(moe))
    size = ragged.round_bytes(moe.receive_buffer, shards, rows, width, hidden, itemsize)
    return [f"buffer {moe.receive_buffer:g}x, {size / 1e6:.1f} MB a round"]


def _visits(cfg: config.Config) -> list[str]:
    """What a limit on router groups says of devices."""
    moe = cfg.model.moe
    axes = sharding.axes(sharding.LAYOUTS[moe.tensor].expert)
    devices = math.prod(getattr(cfg.mesh, axis) for axis in axes)
    limited = devices > 1 and moe.router_groups > moe.router_groups_kept
    return [f"a token visits at most {visits.bound(moe, devices)} of {devices} devices"] if limited else []


def identity(cfg: config.Config, data_hash: str) -> dict[str, str]:
    """What must be the same on all hosts: the config, the versions, this library's own source, the data."""
    source = hashlib.sha256()
    for file in sorted(Path(moejax.__file__).parent.rglob("*.py")):
        source.update(file.read_bytes())
    return {
        "config": json.dumps(config.to_dict(cfg), sort_keys=True),
        "versions": json.dumps(_versions()),
        "code of moejax": source.hexdigest(),
        "data": data_hash,
    }


def _versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in PACKAGES}


def run(built: state.Built, now: state.TrainState, rows: Rows, heldout: Rows) -> dict[str, Any]:
    """Versions, devices, plan, parameter counts, the hash of the data and the least that held-out text can cost, if it is known."""
    total, active = state.count_parameters(built, now.parameters)
    return {
        "plan": line(built.config, built.mesh),
        "parameters": {"total": total, "active": active},
        "devices": [d.device_kind for d in built.mesh.devices.flat],
        "processes": jax.process_count(),
        "data_hash": rows.hash,
        "labels": list(rows.label_names),
        "heldout_floor": heldout.floor,
        "python": platform.python_version(),
        "versions": _versions(),
    }
