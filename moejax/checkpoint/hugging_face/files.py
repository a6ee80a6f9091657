"""Folders of safetensors files: what is in them, from headers alone, and tensors as views of mapped files, read when they are used.

A file is the length of its header in 8 bytes, the header in JSON (name -> type, shape, extent), and the tensors' bytes one after another.
Everything that headers and file sizes can tell is checked when a folder is opened, before any tensor is read.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import mmap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from moejax.errors import DamagedError, UserError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
LENGTH = 8
"""Bytes that the length of a header takes."""
MOST_HEADER = 100_000_000
"""Bytes of the longest header that the format allows."""
TYPES: dict[str, np.dtype] = {
    "BF16": np.dtype(ml_dtypes.bfloat16), "F16": np.dtype(np.float16), "F32": np.dtype(np.float32), "F64": np.dtype(np.float64),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn), "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2), "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8), "U16": np.dtype(np.uint16), "U32": np.dtype(np.uint32), "U64": np.dtype(np.uint64),
    "I8": np.dtype(np.int8), "I16": np.dtype(np.int16), "I32": np.dtype(np.int32), "I64": np.dtype(np.int64),
}  # fmt: skip
"""Names of types in headers."""


@dataclasses.dataclass(frozen=True)
class Stored:
    """Where a tensor lies."""

    file: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    start: int
    """Byte of the file at which it begins."""

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def array(self) -> np.ndarray:
        """A view of the mapped file: what is not used is not read."""
        if not self.bytes:
            return np.zeros(self.shape, self.dtype)
        whole = np.frombuffer(_mapped(self.file), np.uint8, self.bytes, self.start)
        return whole.view(self.dtype).reshape(self.shape)

    def release(self, rows: slice = slice(None)) -> None:
        """Takes the pages of these entries of dimension 0 out of this process; they come back where they are used again."""
        first, last, _ = rows.indices(self.shape[0]) if self.shape else (0, 1, 1)
        row = self.bytes // max(self.shape[0], 1) if self.shape else self.bytes
        begin = (self.start + first * row) // mmap.PAGESIZE * mmap.PAGESIZE
        if last > first and row:
            _mapped(self.file).madvise(mmap.MADV_DONTNEED, begin, self.start + last * row - begin)


def open_folder(folder: Path) -> dict[str, Stored]:
    """The tensors of a published checkpoint by name. Raises UserError where there is none, DamagedError where files are missing, cut
    short, or not what the index says."""
    if (folder / INDEX).is_file():
        return _of_shards(folder)
    if not (folder / SINGLE).is_file():
        raise UserError(
            f"{folder} has neither {INDEX} nor {SINGLE}; give the folder of a checkpoint in safetensors files"
        )
    return read_header(folder / SINGLE)


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object of a checkpoint's folder."""
    try:
        tree = json.loads(file.read_text())
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}; give a folder that has it") from error
    except ValueError as error:
        raise DamagedError(f"{file} is not JSON ({error}); fetch it again") from error
    if not isinstance(tree, dict):
        raise DamagedError(f"{file} is no JSON object; fetch it again")
    return tree


def _of_shards(folder: Path) -> dict[str, Stored]:
    """Held to the index: every shard is there and has what the index says, no tensor lies in two."""
    index = read_json(folder / INDEX).get("weight_map")
    if not isinstance(index, dict) or not all(isinstance(f, str) and f == Path(f).name for f in index.values()):
        raise DamagedError(f"{folder / INDEX} has no weight_map from tensors to files beside it; fetch it again")
    shards = sorted(set(index.values()))
    missing = [name for name in shards if not (folder / name).is_file()]
    if missing:
        raise DamagedError(
            f"{folder} lacks {', '.join(missing[:3])} of {len(shards)} shards ({len(missing)} missing); fetch them"
        )
    found: dict[str, Stored] = {}
    for shard in shards:
        there = read_header(folder / shard)
        twice = there.keys() & found.keys()
        if twice:
            name = min(twice)
            raise DamagedError(
                f"tensor {name} is in {found[name].file} and in {folder / shard}; fetch the checkpoint again"
            )
        found |= there
    for name, shard in index.items():
        if name not in found or found[name].file.name != shard:
            raise DamagedError(f"{folder / shard} has no tensor {name}, which {INDEX} says it has; fetch both again")
    return found


def read_header(file: Path) -> dict[str, Stored]:
    """The tensors of one file; its size is held to what the header says."""
    size = file.stat().st_size
    with open(file, "rb") as content:
        length = int.from_bytes(content.read(LENGTH), "little")
        if size < LENGTH or length > min(size - LENGTH, MOST_HEADER):
            raise DamagedError(
                f"{file} has {size} bytes and a header of {length}: it is cut short or no safetensors file; fetch it again"
            )
        try:
            header = json.loads(content.read(length))
            header.pop("__metadata__", None)
            found = {name: _entry(file, LENGTH + length, entry) for name, entry in header.items()}
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise DamagedError(
                f"{file} has a header that cannot be read ({type(error).__name__}: {error}); fetch it again"
            ) from error
    end = LENGTH + length
    for name, tensor in sorted(found.items(), key=lambda item: item[1].start):
        if tensor.start != end:
            raise DamagedError(
                f"{file}: tensor {name} begins at byte {tensor.start}, the one before it ends at {end}; fetch it again"
            )
        end += tensor.bytes
        if end > size:
            raise DamagedError(f"{file} is cut short: tensor {name} ends at byte {end} of {size}; fetch it again")
    if end != size:
        raise DamagedError(f"{file} has {size} bytes, its tensors end at {end}; fetch it again")
    return found


def _entry(file: Path, begin: int, entry: Mapping[str, Any]) -> Stored:
    first, last = entry["data_offsets"]
    tensor = Stored(file, TYPES[entry["dtype"]], tuple(int(n) for n in entry["shape"]), begin + int(first))
    if tensor.bytes != last - first or min((*tensor.shape, first)) < 0:
        raise ValueError(f"an extent of {last - first} bytes for {entry['dtype']}{entry['shape']}")
    return tensor


@functools.lru_cache(maxsize=1024)
def _mapped(file: Path) -> mmap.mmap:
    with open(file, "rb") as content:
        return mmap.mmap(content.fileno(), 0, access=mmap.ACCESS_READ)
