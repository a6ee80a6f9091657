"""This library's block with lax.ragged_dot as its grouped matmul: blocks for peer_process.py.

It takes gigabytes a call, which in one process disturbs whatever is timed after it."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np

from moejax import config, memory
from moejax import mesh as meshes
from moejax.bench import block


def blocks(arrays: dict[str, np.ndarray], settings: dict[str, Any]) -> tuple[dict, Any, dict]:
    """Drawn as bench/block.py draws its own, which is what the arrays are."""
    memory.keep_freed()
    cfg = config.from_dict(settings["config"])
    model = dataclasses.replace(cfg.model, moe=dataclasses.replace(cfg.model.moe, kernel="xla"))
    jax.set_mesh(meshes.make(config.Mesh(), jax.devices()[:1])).__enter__()  # for as long as the process lives
    calls = block.functions(block.drawn(model, settings["skew"]), cfg)
    done = {kind: lambda call=call: jax.block_until_ready(call()) for kind, call in calls.items()}
    return {"ragged_dot": done}, np.float32, {"ragged_dot": f"jax {jax.__version__}"}
