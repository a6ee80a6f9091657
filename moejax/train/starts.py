"""Runs that begin with a state made elsewhere: published weights, and step 0 of a new workdir."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np

from moejax import config, sharding
from moejax.checkpoint.hugging_face import depth
from moejax.checkpoint.hugging_face.published import Published
from moejax.checkpoint.hugging_face.stream import Progress, stream
from moejax.checkpoint.hugging_face.weights import BIAS
from moejax.checkpoint.manager import Checkpoints, flatten, unflatten
from moejax.errors import UserError
from moejax.train import state as states
from moejax.train.state import TrainState
from moejax.train.workdir import Workdir


def of_published(
    built: states.Built, published: Published, progress: Progress = lambda done, total: None
) -> tuple[TrainState, list[dict[str, str]]]:
    """Step 0 with published weights, streamed into the shards of `built`, and what became of every tensor. Moments are fresh.

    Raises as `stream`.
    """
    targets = leaves_of_published(built)
    arrays, report = stream(published, targets, progress)
    own = {"parameters": built.shardings}
    begun = states.begin(built, unflatten(arrays, own)["parameters"])
    if BIAS in arrays:
        begun = unflatten(flatten(begun) | {BIAS: arrays[BIAS]}, begun)
    return begun, report


def leaves_of_published(built: states.Built) -> dict[str, jax.ShapeDtypeStruct]:
    """Path of the train state -> shape, type and sharding of what published tensors become: parameters, and the bias on selection."""
    found = flatten({"parameters": states.abstract(built)})
    model = built.config.model
    if model.moe.selection_bias:
        shape = (len(depth.of_channel(model, "sparse")), model.moe.num_experts)
        found[BIAS] = jax.ShapeDtypeStruct(shape, np.float32, sharding=sharding.replicated(built.mesh))
    return found


def require_new(workdir: Path) -> None:
    """Raises UserError where a run is already there."""
    if (workdir / "config.json").exists() or any((workdir / "checkpoints").glob("*")):
        raise UserError(f"--workdir={workdir} already holds a run; choose another --workdir, or delete it")


def write(workdir: Path, cfg: config.Config, state: TrainState, event: str, **facts: Any) -> None:
    """A workdir whose run begins with this state at step 0. The checkpoint comes first: a workdir without it would train from nothing."""
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--workdir={workdir} cannot be written: {error.strerror}; choose another") from error
    checkpoints = Checkpoints(workdir / "checkpoints", cfg.checkpoint)
    checkpoints.save(0, state)
    checkpoints.close()
    files = Workdir(str(workdir), cfg, primary=True)
    files.event(event, **facts)
    files.close()
