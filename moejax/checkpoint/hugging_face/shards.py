"""Writing safetensors files: sizes are known first, then tensors come one at a time and are written as they come.

Files get temporary names and are renamed together at the end, the config last: a folder with config.json is whole.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from moejax.checkpoint.hugging_face.files import INDEX, LENGTH, SINGLE, TYPES
from moejax.errors import UserError

SHARD_BYTES = 5_000_000_000
"""Most bytes of a shard, unless one tensor alone has more."""
Described = Mapping[str, tuple[tuple[int, ...], np.dtype]]
NAMES = {dtype: name for name, dtype in TYPES.items()}


def write(
    folder: Path,
    described: Described,
    make: Callable[[str], np.ndarray],
    config: Mapping[str, Any],
    *,
    shard_bytes: int = SHARD_BYTES,
) -> list[Path]:
    """Writes tensors in the order of `described` (shape and type of each); `make` is called for one at a time.

    Raises UserError where the folder already holds a checkpoint or cannot be written, ValueError where a tensor is not as described.
    """
    if (folder / "config.json").exists() or any(folder.glob("*.safetensors*")):
        raise UserError(f"{folder} already holds a checkpoint; choose another folder, or delete it")
    groups = layout(described, shard_bytes)
    names = (
        [SINGLE]
        if len(groups) == 1
        else [f"model-{i:05}-of-{len(groups):05}.safetensors" for i in range(1, len(groups) + 1)]
    )
    extra = {"config.json": dict(config)}
    if len(groups) > 1:
        total = sum(_bytes(*described[name]) for name in described)
        where = {tensor: file for file, group in zip(names, groups, strict=True) for tensor in group}
        extra = {INDEX: {"metadata": {"total_size": total}, "weight_map": where}} | extra
    temporary = {name: folder / f".{name}.{os.getpid()}" for name in (*names, *extra)}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, group in zip(names, groups, strict=True):
            _write_one(temporary[name], {tensor: described[tensor] for tensor in group}, make)
        for name, tree in extra.items():
            temporary[name].write_text(json.dumps(tree, indent=2) + "\n")
        for name, beside in temporary.items():
            os.replace(beside, folder / name)
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error.strerror}; make room or choose another folder") from error
    finally:
        for beside in temporary.values():
            beside.unlink(missing_ok=True)
    return [folder / name for name in (*names, *extra)]


def layout(described: Described, shard_bytes: int) -> list[list[str]]:
    """Tensors in order, cut into shards of at most so many bytes; a larger tensor has a shard of its own."""
    groups: list[list[str]] = [[]]
    room = shard_bytes
    for name, description in described.items():
        size = _bytes(*description)
        if groups[-1] and size > room:
            groups.append([])
            room = shard_bytes
        groups[-1].append(name)
        room -= size
    return groups


def _bytes(shape: tuple[int, ...], dtype: np.dtype) -> int:
    return math.prod(shape) * dtype.itemsize


def _write_one(file: Path, described: Described, make: Callable[[str], np.ndarray]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (shape, dtype) in described.items():
        begin, end = end, end + _bytes(shape, dtype)
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % LENGTH)
    with open(file, "wb") as out:
        out.write(len(text).to_bytes(LENGTH, "little") + text)
        for name, (shape, dtype) in described.items():
            value = make(name)
            if value.shape != shape or value.dtype != dtype:
                raise ValueError(f"{name} is {value.dtype}{list(value.shape)}, described as {dtype}{list(shape)}")
            out.write(np.ascontiguousarray(value).reshape(-1).view(np.uint8).data)
        out.flush()
        os.fsync(out.fileno())
