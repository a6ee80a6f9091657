"""The steps that a run is made of, ready to be lowered for devices that need not be there: the functions themselves, and shapes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from moejax import config
from moejax.arrays import Batch
from moejax.data import batches
from moejax.errors import ConfigError
from moejax.models.generate import Generator, Sizes
from moejax.moe.inputs import Mode
from moejax.moe.routers import ROUTERS
from moejax.train import state, step


class Program(NamedTuple):
    """A jitted step and what it takes."""

    step: Any
    arguments: tuple[Any, ...]
    """Trees of jax.ShapeDtypeStruct with shardings."""
    tokens: int
    """Positions that one call reads, of all rows."""


def train(cfg: config.Config, mesh: jax.sharding.Mesh) -> Program:
    """One update."""
    built = state.build(cfg, mesh)
    begun, batch = state.whole_template(built), _batch(built)
    return Program(step.make_train_step(built, begun), (begun, batch), batch.tokens.size)


def evaluate(cfg: config.Config, mesh: jax.sharding.Mesh) -> Program:
    """Held-out sums of one batch, dropless where the router can be."""
    built, moe = state.build(cfg, mesh), cfg.model.moe
    begun, batch = state.whole_template(built), _batch(built)
    mode = Mode(training=False, capacity_factor=moe.capacity_factor if ROUTERS[moe.router].bounded else None)
    return Program(step.make_eval_step(built, begun, mode), (begun, batch), batch.tokens.size)


def prefill(cfg: config.Config, mesh: jax.sharding.Mesh) -> Program:
    """Prompts of `data.context` positions, `data.batch` of them, read at once into the cache."""
    return _read(cfg, mesh, cfg.data.context)


def decode(cfg: config.Config, mesh: jax.sharding.Mesh) -> Program:
    """One more token of `data.batch` rows whose cache has room for `data.context` positions."""
    return _read(cfg, mesh, 1)


STEPS: dict[str, Callable[[config.Config, jax.sharding.Mesh], Program]] = {
    "train": train,
    "eval": evaluate,
    "prefill": prefill,
    "decode": decode,
}


def build(name: str, cfg: config.Config, mesh: jax.sharding.Mesh) -> Program:
    """The program of a name in STEPS."""
    if name not in STEPS:
        raise ConfigError(f"--step={name}: choose one of {', '.join(STEPS)}")
    return STEPS[name](cfg, mesh)


def _read(cfg: config.Config, mesh: jax.sharding.Mesh, positions: int) -> Program:
    """Parameters are served in the compute type, but for the router's."""
    model = dataclasses.replace(cfg.model, further=0)
    built = state.build(dataclasses.replace(cfg, model=model), mesh)
    begun, rows = state.template(built), cfg.data.batch
    generator = Generator(model, built.model, mesh, Sizes(rows, cfg.data.context, positions))
    served = jnp.dtype(model.compute_dtype)

    def lies(path: Any, x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        router = any(getattr(key, "key", None) == "router" for key in path)
        return jax.ShapeDtypeStruct(x.shape, x.dtype if router else served, sharding=x.sharding)

    parameters = jax.tree_util.tree_map_with_path(lies, begun.parameters)
    arguments = (parameters, begun.routing, begun.step, *generator.template(positions))
    return Program(generator.read, arguments, rows * positions)


def _batch(built: state.Built) -> Batch:
    """Shapes of a batch, padded to what the mesh divides."""
    cfg, where = built.config, step.batch_shardings(built)
    rows = batches.padded_rows(cfg, built.mesh, cfg.data.batch)
    types = {"valid": jnp.bool_}

    def field(name: str, lies: Any) -> Any:
        shape = (rows,) if name == "row_ids" else (rows, cfg.data.context)
        return None if lies is None else jax.ShapeDtypeStruct(shape, types.get(name, jnp.int32), sharding=lies)

    return Batch(**{f.name: field(f.name, getattr(where, f.name)) for f in dataclasses.fields(where)})


def bytes_of(program: Program) -> int:
    """Of the arguments on one device, as their shapes and shardings say."""
    leaves = jax.tree.leaves(program.arguments)
    return sum(x.dtype.itemsize * math.prod(x.sharding.shard_shape(x.shape)) for x in leaves)
