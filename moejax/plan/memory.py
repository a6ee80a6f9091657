"""What a step needs of a device's memory, counted from shapes: what it is given exactly, what it makes on the way as an estimate.

No device is there and nothing is compiled. Arguments are those of `plan.programs`, padded to tiles as the TPU compiler lays them out. The
estimate of temporaries serves to sort out meshes that cannot fit (see `plan.temporaries`); only the compiler knows.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from moejax import config, sharding
from moejax import mesh as meshes
from moejax.arrays import Batch
from moejax.data import batches, tokenizer
from moejax.models.decoder import Decoder, empty_cache
from moejax.plan.parts import ONE_DEVICE
from moejax.sharding import LANES
from moejax.train import guard, optimizer, routing

ROWS, LEAST = 8, 512
"""A tile of a TPU is 128 numbers wide and up to 8 rows of 32 bits high; no array takes less than 512 bytes."""
SERVING = ("prefill", "decode")
"""Steps that take parameters in the compute type, and a cache."""


class Lying(NamedTuple):
    """One array of a step's arguments."""

    kind: str
    """weights, optimizer, cache, batch or other."""
    path: tuple[str, ...]
    shape: tuple[int, ...]
    """On all devices together."""
    axes: tuple[tuple[str, ...], ...]
    """Mesh axes that each dimension is cut over."""
    dtype: str
    stacked: int = 0
    """Leading dimensions that count blocks."""
    routed: bool = False
    """A parameter of routed experts."""

    def local(self, mesh: config.Mesh) -> tuple[int, ...]:
        """Shape on one device."""
        return tuple(-(-n // devices(mesh, cut)) for n, cut in zip(self.shape, self.axes, strict=True))


def arguments(cfg: config.Config, step: str = "train") -> dict[str, int]:
    """Bytes of a step's arguments on one device, by kind, padded to tiles. Raises ValueError for an unknown step."""
    found: dict[str, int] = {}
    for x in lying(cfg, step):
        found[x.kind] = found.get(x.kind, 0) + padded_bytes(x.local(cfg.mesh), x.dtype)
    return found


def plain_bytes(cfg: config.Config, step: str = "train") -> int:
    """The same without padding: `plan.programs.bytes_of`."""
    return sum(plain(x.local(cfg.mesh), x.dtype) for x in lying(cfg, step))


def plain(shape: tuple[int, ...], dtype: str) -> int:
    """Bytes of an array without padding."""
    return jnp.dtype(dtype).itemsize * math.prod(shape)


def lying(cfg: config.Config, step: str) -> tuple[Lying, ...]:
    """Every array that a step takes, with its shape for this mesh."""
    if step not in ("train", "eval", *SERVING):
        raise ValueError(f"step {step!r}: train, eval, {', '.join(SERVING)}")
    if step not in SERVING:
        return _state(cfg.model, cfg.train) + _batch(cfg)
    model = dataclasses.replace(cfg.model, further=0)
    return _served(model) + _cache(cfg, model, 1 if step == "decode" else cfg.data.context)


@functools.cache
def padded_bytes(shape: tuple[int, ...], dtype: str) -> int:
    """Bytes of an array as the TPU compiler lays it out: of all ways to choose the two dimensions that are tiled, the one with the least
    padding. Measured with the compiler of jax 0.10.2 for v5p: rows of a tile are 1, 2, 4 or 8, at least as many numbers as 32 bits hold."""
    size = jnp.dtype(dtype).itemsize
    packed = max(1, 4 // size)
    if len(shape) < 2:
        tile = min(max(_power(shape[0] if shape else 1), LANES * packed), LANES * ROWS)
        return max(LEAST, -(-math.prod(shape) // tile) * tile * size)
    least = min(_tiled(shape, rows, lanes, packed) for rows, lanes in itertools.permutations(range(len(shape)), 2))
    return max(LEAST, least * size)


def rows(cfg: config.Config) -> int:
    """Of a training batch, padded to what the mesh divides."""
    return batches.padded_rows(cfg, abstract(cfg.mesh), cfg.data.batch)


def devices(mesh: config.Mesh, axes: tuple[str, ...]) -> int:
    """Along these axes together."""
    return math.prod(getattr(mesh, axis) for axis in axes)


def abstract(mesh: config.Mesh) -> jax.sharding.AbstractMesh:
    """A mesh of these sizes without devices."""
    explicit = (jax.sharding.AxisType.Explicit,) * len(meshes.AXES)
    return jax.sharding.AbstractMesh(meshes.shape(mesh), meshes.AXES, axis_types=explicit)


def _tiled(shape: tuple[int, ...], rows: int, lanes: int, packed: int) -> int:
    """Numbers of an array with these two dimensions in tiles."""
    high = min(max(_power(shape[rows]), packed), ROWS)
    others = math.prod(n for d, n in enumerate(shape) if d not in (rows, lanes))
    return others * -(-shape[rows] // high) * high * -(-shape[lanes] // LANES) * LANES


def _power(number: int) -> int:
    """The least power of two that is not smaller."""
    return 1 << max(number - 1, 0).bit_length()


@functools.lru_cache(maxsize=8)
def weights(model: config.Model) -> tuple[Lying, ...]:
    """Parameters."""
    with jax.sharding.use_abstract_mesh(ONE_DEVICE):
        variables = nnx.state(jax.eval_shape(lambda: Decoder(model, rngs=nnx.Rngs(0))))
    found = []
    for path, variable in nnx.to_flat_state(variables):
        shape, dims = variable.get_value().shape, variable.get_metadata("dims")
        stacked = len(shape) - len(dims)
        axes = ((),) * stacked + tuple(sharding.axes(name) for name in dims)
        routed, dtype = sharding.of_experts(dims), str(variable.get_value().dtype)
        found.append(Lying("weights", tuple(map(str, path)), shape, axes, dtype, stacked, routed))
    return tuple(found)


@functools.lru_cache(maxsize=8)
def _state(model: config.Model, train: config.Train) -> tuple[Lying, ...]:
    """Of a training step."""
    own = weights(model)
    tree = {x.path: jax.ShapeDtypeStruct(x.shape, x.dtype) for x in own}
    moments = jax.eval_shape(optimizer.make(train, dict.fromkeys(tree, True)).init, tree)
    by_path, found = {x.path: x for x in own}, list(own)
    for path, x in jax.tree_util.tree_leaves_with_path(moments):
        like = by_path.get(getattr(path[-1], "key", None))
        axes = like.axes if like and like.shape == x.shape else ((),) * x.ndim
        found.append(Lying("optimizer", (), x.shape, axes, str(x.dtype)))
    return (*found, *_whole(model), *_of_tree(jax.eval_shape(guard.init)))


def _whole(model: config.Model) -> tuple[Lying, ...]:
    """What lies whole on every device: routing state and the number of the step."""
    return _of_tree((jax.ShapeDtypeStruct((), jnp.int32), jax.eval_shape(lambda: routing.init(model))))


def _of_tree(tree: Any, kind: str = "other") -> tuple[Lying, ...]:
    """Arrays that lie as they say, or whole."""

    def one(x: Any) -> Lying:
        spec = getattr(x.sharding, "spec", None) if kind == "cache" else None
        cut = [(entry,) if isinstance(entry, str) else tuple(entry or ()) for entry in spec or ()]
        return Lying(kind, (), x.shape, (*cut, *((),) * (x.ndim - len(cut))), str(x.dtype))

    return tuple(one(x) for x in jax.tree.leaves(tree))


def _batch(cfg: config.Config) -> tuple[Lying, ...]:
    """Padded to what the mesh divides."""
    by_row, both = (sharding.axes("batch"),), (sharding.axes("batch"), sharding.axes("position"))
    fields = [f.name for f in dataclasses.fields(Batch) if f.name != "bytes" or _counted(cfg)]
    shapes = {"row_ids": ((rows(cfg),), by_row)}
    found = []
    for name in fields:
        shape, axes = shapes.get(name, ((rows(cfg), cfg.data.context), both))
        found.append(Lying("batch", (name,), shape, axes, "bool" if name == "valid" else "int32"))
    return tuple(found)


def _counted(cfg: config.Config) -> bool:
    """Whether targets come with a number of bytes."""
    return cfg.data.tokenizer != tokenizer.NAME


@functools.lru_cache(maxsize=8)
def _served(model: config.Model) -> tuple[Lying, ...]:
    """Parameters in the compute type, but for the router's."""
    own = weights(model)
    return (*(x if "router" in x.path else x._replace(dtype=model.compute_dtype) for x in own), *_whole(model))


@functools.lru_cache(maxsize=8)
def _cache(cfg: config.Config, model: config.Model, positions: int) -> tuple[Lying, ...]:
    """The cache, the last hidden vectors, and the tokens that come. On this config's mesh, because types name no axis of one device."""
    rows = cfg.data.batch
    with jax.sharding.use_abstract_mesh(abstract(cfg.mesh)):
        kept = jax.eval_shape(lambda: empty_cache(model, rows, cfg.data.context))
    batch = sharding.axes("batch")
    tokens = ((rows, positions), (batch, sharding.axes("position")))
    return (
        *_of_tree(kept, "cache"),
        Lying("cache", ("hidden",), (rows, model.width), (batch, ()), model.compute_dtype),
        Lying("batch", ("tokens",), *tokens, "int32"),
        Lying("batch", ("valid",), *tokens, "bool"),
    )
