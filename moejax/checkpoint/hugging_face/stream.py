"""A published checkpoint straight into sharded arrays: every device's part is filled from the tensors it needs, one after another.

Stored tensors are views of mapped files, and steps that move entries about only make other views of them, so a part reads the bytes it
takes and no more. At a time there are one part, and for each thread one tensor, or one row of it where rows suffice: mapped, and once more
where it is dequantised. What was read is given back at once.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import numpy as np

from moejax.checkpoint.hugging_face.published import Published
from moejax.checkpoint.rules import Job, RuleError
from moejax.checkpoint.transforms import Key, Stack, Transform

Progress = Callable[[int, int], None]
"""Called with bytes made and bytes to make on this process."""
THREADS = 4
LINE = 64
"""Bytes of a processor's cache line, and what the address of an array must be a multiple of for jax to take it on a CPU without a copy."""
STRIP = 16
"""Entries of the last dimension that are turned at a time: a line of float32."""
Index = tuple[slice, ...]
Bounds = tuple[tuple[int, int], ...]
"""First and one past the last index of every dimension."""


class Piece(NamedTuple):
    """What one published tensor gives to a part."""

    name: str
    rows: slice
    """Of the tensor's dimension 0."""
    taken: Index
    """Of what the steps make of those rows."""
    into: tuple[slice | int, ...]
    """Where in the part it goes."""


def stream(
    published: Published, targets: Mapping[str, jax.ShapeDtypeStruct], progress: Progress = lambda done, total: None
) -> tuple[dict[str, jax.Array], list[dict[str, str]]]:
    """Every target as an array in its sharding, and the report of published.report.

    Args:
      targets: path of the train state -> shape, type and sharding; all leaves that the family's rules write.

    Raises as Published.plan before anything is read.
    """
    jobs = published.plan(targets)
    parts = {path: _parts(target) for path, target in targets.items()}
    total = sum(_size(index) * targets[path].dtype.itemsize for path, found in parts.items() for index in found)
    counted = _Counter(total, progress)
    with ThreadPoolExecutor(THREADS) as pool:
        arrays = {path: _array(published, job, targets[path], parts[path], pool, counted) for path, job in jobs.items()}
    return arrays, published.report(jobs)


class _Counter:
    """Bytes made so far, told as they are."""

    def __init__(self, total: int, progress: Progress):
        self._total, self._progress = total, progress
        self._done = 0
        self._lock = threading.Lock()

    def add(self, number: int) -> None:
        with self._lock:
            self._done += number
            self._progress(self._done, self._total)


def _parts(target: jax.ShapeDtypeStruct) -> dict[Bounds, list[jax.Device]]:
    """The parts of this process, and the devices that hold each."""
    assert target.sharding is not None
    found: dict[Bounds, list[jax.Device]] = {}
    for device, index in target.sharding.addressable_devices_indices_map(target.shape).items():
        bounds = tuple(s.indices(n)[:2] for s, n in zip(index, target.shape, strict=True))
        found.setdefault(bounds, []).append(device)
    return found


def _size(bounds: Bounds) -> int:
    return int(np.prod([last - first for first, last in bounds]))


def _array(
    published: Published, job: Job, target: jax.ShapeDtypeStruct, parts: Mapping[Bounds, list[jax.Device]], pool: ThreadPoolExecutor,
    counted: _Counter,
) -> jax.Array:  # fmt: skip
    placed = []
    for bounds, devices in parts.items():
        part = _part(published, job, bounds, target.dtype, pool, counted)
        placed += jax.block_until_ready(jax.device_put([part] * len(devices), devices))
    return jax.make_array_from_single_device_arrays(target.shape, target.sharding, placed)


def _part(
    published: Published, job: Job, bounds: Bounds, dtype: np.dtype, pool: ThreadPoolExecutor, counted: _Counter
) -> np.ndarray:
    part = _room([last - first for first, last in bounds], dtype)
    done = [pool.submit(_fill, published, job, part, piece, counted) for piece in _pieces(published, job, bounds)]
    for future in done:
        future.result()
    return part


def _room(shape: list[int], dtype: np.dtype) -> np.ndarray:
    """An array without values that begins at a cache line."""
    size = math.prod(shape) * dtype.itemsize
    room = np.empty(size + LINE, np.uint8)
    first = -room.ctypes.data % LINE
    return room[first : first + size].view(dtype).reshape(shape)


def _steps(job: Job) -> tuple[tuple[Transform, ...], tuple[Stack, ...]]:
    """What is done to one tensor, and what gathers tensors, which comes last."""
    single = tuple(step for step in job.rule.steps if not isinstance(step, Stack))
    stacks = tuple(step for step in job.rule.steps if isinstance(step, Stack))
    if (*single, *stacks) != job.rule.steps:
        raise RuleError(
            f"{job.goal.path}: {job.rule}: a part cannot be made alone; put every Stack after the other steps"
        )
    return single, stacks


def _pieces(published: Published, job: Job, bounds: Bounds) -> Iterator[Piece]:
    """The tensors that reach into a part."""
    single, stacks = _steps(job)
    by_rows = all(step.by_rows for step in single)
    for key, name in job.reads.items():
        where = _where(dict(key), stacks, len(bounds))
        if any(n is not None and not first <= n < last for n, (first, last) in zip(where, bounds, strict=True)):
            continue
        into = tuple(slice(None) if n is None else n - first for n, (first, _) in zip(where, bounds, strict=True))
        taken = tuple(slice(*bound) for n, bound in zip(where, bounds, strict=True) if n is None)
        if by_rows and published.tensors[name].rowwise:
            yield from _rows(name, taken, into)
        else:
            yield Piece(name, slice(None), taken, into)


def _where(places: Mapping[str, int], stacks: tuple[Stack, ...], ndim: int) -> list[int | None]:
    """Of every dimension of the target the entry that a tensor is, or None where it has all."""
    found: list[int | None] = [None] * (ndim - len(stacks))
    for stack in stacks:
        found.insert(stack.axis, places[stack.field])
    return found


def _rows(name: str, taken: Index, into: tuple[slice | int, ...]) -> Iterator[Piece]:
    """One row at a time: a part of a quantised tensor of all experts would be dequantised for all of them at once."""
    axis = next(i for i, n in enumerate(into) if isinstance(n, slice))
    for at, row in enumerate(range(taken[0].start, taken[0].stop)):
        yield Piece(
            name, slice(row, row + 1), (slice(0, 1), *taken[1:]), (*into[:axis], slice(at, at + 1), *into[axis + 1 :])
        )


def _fill(published: Published, job: Job, part: np.ndarray, piece: Piece, counted: _Counter) -> None:
    single, _ = _steps(job)
    tensor = published.tensors[piece.name]
    made: dict[Key, Any] = {(): tensor.array(piece.rows)}
    for step in single:
        made = step.parts(made, job.goal)
    target = part[piece.into]
    _copy(target, made[()][piece.taken])
    tensor.release(piece.rows)
    counted.add(target.nbytes)


def _copy(target: np.ndarray, source: np.ndarray) -> None:
    """In strips where the source is turned: whole, every line of the target is fetched as often as it has entries, at a third of the
    speed. Types are changed before a strip is turned, which is as much faster."""
    if source.ndim < 2 or source.strides[-1] == source.itemsize:
        return np.copyto(target, source, casting="unsafe")
    typed = np.empty_like(source[..., :STRIP], target.dtype)
    for first in range(0, source.shape[-1], STRIP):
        strip = source[..., first : first + STRIP]
        np.copyto(typed[..., : strip.shape[-1]], strip, casting="unsafe")
        np.copyto(target[..., first : first + STRIP], typed[..., : strip.shape[-1]])
