"""One measurement of convert.py in a process of its own: seconds, and the most memory that it held.

python -m moejax.bench.convert_process read|stream|begin FOLDER DTYPE: prints one JSON object.
"""

from __future__ import annotations

import json
import math
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import ml_dtypes  # noqa: F401 (NumPy knows bfloat16 by name then)
import numpy as np

from moejax import config
from moejax import mesh as meshes
from moejax.checkpoint.hugging_face import stream
from moejax.checkpoint.hugging_face.published import Published, open_published
from moejax.train import starts, state

BUFFER = 2**24
NEW = 10**9
EVERY = 0.005
"""Seconds between looks at what is resident."""
TRIES = 10
LOOKS = 64
"""Places of a file where it is tried whether it lies in memory."""
Answer = dict[str, Any]


class Watch:
    """Most bytes of this process while it is open: private ones and those of mapped files, by looking; both, by the kernel's count."""

    def __init__(self) -> None:
        self.most = {"RssAnon": 0, "RssFile": 0}
        self.before = status("VmHWM")
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        self.peak = status("VmHWM")

    def _look(self) -> None:
        while not self._ended.wait(EVERY):
            self.most = {name: max(bytes_, status(name)) for name, bytes_ in self.most.items()}


def status(name: str) -> int:
    """Bytes of a line of /proc/self/status."""
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def forget(file: Path) -> bool:
    """Asks the kernel to drop a file from memory; whether it did."""
    handle = os.open(file, os.O_RDONLY)
    try:
        size = os.fstat(handle).st_size
        for _ in range(TRIES):  # pages that were just used are let go a moment later
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            if not any(_in_memory(handle, at) for at in range(0, size, max(size // LOOKS, 1))):
                return True
            time.sleep(0.2)
        return False
    finally:
        os.close(handle)


def _in_memory(handle: int, at: int) -> bool:
    try:
        return os.preadv(handle, [bytearray(1)], at, os.RWF_NOWAIT) == 1
    except BlockingIOError:
        return False


def read(files: list[Path]) -> Answer:
    """Every byte once, in order, into one buffer."""
    buffer = bytearray(BUFFER)
    for file in files:
        with open(file, "rb", buffering=0) as content:
            while content.readinto(buffer):
                pass
    return {"arrays": 0, "largest": 0}


def new_memory() -> float:
    """Bytes a second at which memory that was never used is filled: what arrays cost whatever they are made of."""
    began = time.perf_counter()
    np.empty(NEW, np.uint8).fill(1)
    return NEW / (time.perf_counter() - began)


def into_arrays(published: Published, kind: str) -> Answer:
    """Into arrays of one device."""
    found = starts.leaves_of_published(built(published))
    targets = {path: jax.ShapeDtypeStruct(x.shape, np.dtype(kind), sharding=x.sharding) for path, x in found.items()}
    arrays, _ = stream.stream(published, targets)
    return _sizes(arrays)


def into_a_run(published: Published, kind: str) -> Answer:
    """Into step 0 of a new workdir beside the folder: what scripts/convert.py does."""
    made = built(published)
    begun, _ = starts.of_published(made, published)
    starts.write(published.folder.with_name("run"), made.config, begun, "converted")
    return _sizes(begun)


def _sizes(tree: Any) -> Answer:
    sizes = [x.nbytes for x in jax.tree.leaves(jax.block_until_ready(tree))]
    return {"arrays": sum(sizes), "largest": max(sizes)}


def built(published: Published) -> state.Built:
    """The model of a checkpoint on one device."""
    mesh = meshes.make(config.Mesh(), jax.devices()[:1])
    return state.build(config.Config(model=published.model), mesh)


def main(kind: str, folder: str, made: str) -> None:
    """Prints the numbers."""
    files = sorted(Path(folder).glob("*.safetensors"))
    cold = all([forget(file) for file in files])
    published = open_published(Path(folder))
    work: dict[str, Callable[[], Answer]] = {
        "read": lambda: read(files), "stream": lambda: into_arrays(published, made), "begin": lambda: into_a_run(published, made),
    }  # fmt: skip
    with Watch() as watch:
        began = time.perf_counter()
        answer = work[kind]()
        seconds = time.perf_counter() - began
    stored = sum(math.prod(t.shape) * p.dtype.itemsize for t in published.tensors.values() for p in t.parts.values())
    answer |= {"seconds": seconds, "bytes": stored, "cold": cold, "before": watch.before, "peak": watch.peak}
    if kind == "read":
        answer |= {"touched": new_memory() / 1e9}
    print(json.dumps(answer | {"anonymous": watch.most["RssAnon"], "mapped": watch.most["RssFile"]}))


if __name__ == "__main__":
    main(*sys.argv[1:])
