"""A run that is over or under way, read back: its config, arrays of a checkpoint, or the model ready for a forward pass."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from moejax import config
from moejax import mesh as meshes
from moejax.checkpoint.manager import Checkpoints
from moejax.data import tokenizer
from moejax.errors import DamagedError, UserError
from moejax.train import check, state

TOKENIZER = "tokenizer"
"""Folder of a workdir for what comes with a published model and is no weight: its vocabulary, its config.json."""


class Model(NamedTuple):
    """What a forward pass takes."""

    built: state.Built
    state: state.TrainState
    """Without what only training reads: its optimizer and guard are None."""
    step: int


def read_config(workdir: Path, flag: str = "--workdir") -> config.Config:
    """Of a workdir, which the user gave as `flag`. Text is read in the workdir's own vocabulary where it has one."""
    file = workdir / "config.json"
    if not file.is_file():
        raise UserError(f"{flag}={workdir} is no run: it has no config.json; give the --workdir of scripts/train.py")
    try:
        cfg = config.from_dict(json.loads(file.read_text()))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DamagedError(f"{file} is not JSON ({error}); restore it from the run's command") from error
    if (workdir / TOKENIZER / "tokenizer.json").is_file():
        cfg = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, tokenizer=str(workdir / TOKENIZER)))
    return cfg


@contextlib.contextmanager
def checkpoint(
    workdir: Path, cfg: config.Config, step: int | None = None, flag: str = "--workdir"
) -> Iterator[tuple[Checkpoints, int]]:
    """The checkpoints of a workdir and the step asked for, or the last one. UserError where there is none."""
    folder = workdir / "checkpoints"
    if not folder.is_dir():
        raise UserError(f"{flag}={workdir} holds no checkpoint yet; wait for one, or lower its checkpoint.every")
    checkpoints = Checkpoints(folder, cfg.checkpoint)
    try:
        steps = checkpoints.steps()
        if not steps:
            raise UserError(f"{flag}={workdir} holds no checkpoint yet; wait for one, or lower its checkpoint.every")
        if step is not None and step not in steps:
            raise UserError(f"--step={step}: {flag}={workdir} holds checkpoints of steps {steps}; choose one of them")
        yield checkpoints, max(steps) if step is None else step
    finally:
        checkpoints.close()


def read_arrays(
    workdir: Path, flag: str = "--workdir", names: Callable[[str], bool] = lambda name: True
) -> tuple[config.Config, int, dict[str, np.ndarray]]:
    """The config of a run, the step of its last checkpoint, and the arrays asked for, on the host."""
    cfg = read_config(workdir, flag)
    with checkpoint(workdir, cfg, flag=flag) as (checkpoints, step):
        return cfg, step, checkpoints.load_arrays(step, names)


def model(workdir: Path, cfg: config.Config, step: int | None = None) -> Model:
    """Parameters and routing state of a checkpoint, straight into their shards; the rest of it is not read.

    On the devices of the config's mesh; on one where there are fewer than that.
    """
    check.check_vocabulary(cfg)
    wanted = math.prod(meshes.shape(cfg.mesh))
    if wanted > len(jax.devices()):
        cfg, wanted = dataclasses.replace(cfg, mesh=config.Mesh()), 1
    mesh = meshes.make(cfg.mesh, jax.devices()[:wanted])
    built = state.build(dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, microbatches=1)), mesh)
    with checkpoint(workdir, cfg, step) as (checkpoints, found), jax.set_mesh(mesh):
        return Model(built, checkpoints.restore_part(found, state.template(built)), found)


def tokens(cfg: config.Config) -> tokenizer.Tokenizer:
    """The vocabulary that a run reads."""
    return tokenizer.of(cfg.data.tokenizer)
