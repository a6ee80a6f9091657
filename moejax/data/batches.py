"""Host arrays -> a global Batch on the mesh, padded with invalid rows to what the mesh and the microbatches divide."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np

from moejax import config, sharding
from moejax.arrays import Batch
from moejax.data.pipeline import Arrays

BLANK = {"tokens": 0, "targets": 0, "segments": 0, "valid": False, "labels": 0, "bytes": 0}
"""Of a row that is missing: an id of any vocabulary, at no position that counts."""


def padded_rows(cfg: config.Config, mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh, rows: int) -> int:
    """`rows` raised to a multiple of batch shards * microbatches * rows of a group * groups exchanged apart."""
    moe = cfg.model.moe
    unit = sharding.shards(mesh, "batch") * cfg.train.microbatches * moe.group_rows * moe.chunks
    return -(-rows // unit) * unit


def shardings(mesh: jax.sharding.Mesh, *, counted: bool = False) -> Batch:
    """Where each array of a batch lies; `counted` where its targets have a number of bytes."""
    rows, positions = sharding.batch_sharding(mesh, 1), sharding.batch_sharding(mesh, 2)
    where = {f.name: positions for f in dataclasses.fields(Batch)}
    return Batch(**where | {"row_ids": rows, "bytes": positions if counted else None})


def rows_of_host(mesh: jax.sharding.Mesh, total: int) -> slice:
    """The rows of a global batch of `total` rows that this process's devices hold; contiguous on a row-major mesh."""
    pieces = sharding.batch_sharding(mesh, 1).addressable_devices_indices_map((total,)).values()
    spans = {(index[0].start or 0, total if index[0].stop is None else index[0].stop) for index in pieces if index}
    start, stop = min(a for a, _ in spans), max(b for _, b in spans)
    if sum(b - a for a, b in spans) != stop - start:
        raise ValueError(f"the devices of one process hold separate rows {sorted(spans)}; order the mesh by process")
    return slice(start, stop)


def put(host: Arrays, mesh: jax.sharding.Mesh, total: int) -> Batch:
    """This process's real rows -> the global Batch of `total` rows; rows that are missing are invalid."""
    mine = rows_of_host(mesh, total)
    missing = mine.stop - mine.start - len(host["row_ids"])

    def place(local: np.ndarray) -> jax.Array:
        def piece(index: tuple[slice, ...]) -> np.ndarray:
            first, last, _ = index[0].indices(total)
            return local[(slice(first - mine.start, last - mine.start), *index[1:])]

        shape = (total, *local.shape[1:])
        return jax.make_array_from_callback(shape, sharding.batch_sharding(mesh, local.ndim), piece)

    def extend(name: str, value: np.ndarray) -> np.ndarray:
        return np.concatenate([value, np.full((missing, *value.shape[1:]), BLANK[name], value.dtype)])

    fields = {name: place(extend(name, value)) for name, value in host.items() if name != "row_ids"}
    return Batch(**fields, row_ids=place(np.arange(mine.start, mine.stop, dtype=np.int32)))
