"""Asks another process what a step compiles to for a TPU topology, and remembers the answer."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import moejax
from moejax import config
from moejax.errors import ConfigError, UserError

LIBTPU = "tpu"
"""Folder under the interpreter's own where `make tpu` puts the compiler: in the common path every command would look for a TPU."""
COMPILER = (sys.executable, "-m", "moejax.plan.compiling")
SPARE = 2**30
"""Bytes of this machine's memory that a compilation leaves to others."""


@dataclasses.dataclass(frozen=True)
class Request:
    """A step to compile."""

    config: config.Config
    topology: str
    """As the compiler names it: v5p:8x8x8, in chips of one slice."""
    slices: int = 1
    step: str = "train"
    """A name in moejax.plan.programs.STEPS."""

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"config": config.to_dict(self.config)}


def compiled(request: Request, cache: Path | None, memory: int | None = None) -> dict[str, Any]:
    """What moejax.plan.compiling says of the request: from the folder `cache`, or from the compiler and into it.

    Args:
      memory: bytes that the compiler may take; None is what this machine has free, less SPARE.

    Raises ConfigError for what the compiler refuses, UserError where it is not installed or wants more memory.
    """
    folder = libtpu()
    kept = None if cache is None else _made(cache) / f"{key(request, folder)}.json"
    if kept is not None and kept.is_file():
        with contextlib.suppress(ValueError):  # a file that was damaged is made again
            return json.loads(kept.read_text())
    answer = _asked(request, folder, memory or free_memory() - SPARE)
    if "error" in answer:
        raise ConfigError(answer["error"])
    answer |= {"versions": versions(folder)}
    if kept is not None:
        part = kept.with_suffix(f".{os.getpid()}")
        part.write_text(json.dumps(answer, indent=1))
        part.replace(kept)
    return answer


def libtpu() -> Path | None:
    """Where the compiler is: a folder for PYTHONPATH, or None where it is installed like any package. Raises UserError without one."""
    apart = Path(sys.prefix) / LIBTPU
    if (apart / "libtpu").is_dir():
        return apart
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            "compiling for TPU needs libtpu, which is not installed: `make tpu`, or pip install 'moejax[tpu]' (the extra `tpu`); "
            "without --topology the plan counts and does not compile"
        )
    return None


def key(request: Request, folder: Path | None) -> str:
    """Of all that the answer depends on: the request, the versions, this library's own source."""
    said = json.dumps([request.to_dict(), versions(folder), code()], sort_keys=True)
    return hashlib.sha256(said.encode()).hexdigest()[:32]


def code() -> str:
    """A hash of this library's source, but for what only reads or shows results."""
    found = hashlib.sha256()
    root = Path(moejax.__file__).parent
    for file in sorted(root.rglob("*.py")):
        if file.relative_to(root).parts[0] not in ("bench", "report"):
            found.update(file.read_bytes())
    return found.hexdigest()


def versions(folder: Path | None) -> dict[str, str]:
    """Of what compiles."""
    places = {"path": [str(folder)]} if folder else {}
    of_libtpu = next(iter(importlib.metadata.distributions(name="libtpu", **places)), None)
    found = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib")}
    return found | {"libtpu": of_libtpu.version if of_libtpu else "unknown"}


def free_memory() -> int:
    """Bytes that a new process can have."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _made(cache: Path) -> Path:
    """The folder, before the compiler has worked for it."""
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"--cache={cache} cannot be written ({error.strerror}); choose another folder, or --cache= for none"
        ) from error
    return cache


def _asked(request: Request, folder: Path | None, memory: int) -> dict[str, Any]:
    places = [
        str(Path(moejax.__file__).parents[1]),
        *([str(folder)] if folder else []),
        os.environ.get("PYTHONPATH", ""),
    ]
    process = subprocess.Popen(
        COMPILER,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(p for p in places if p)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    started = time.monotonic()
    with _watched(process, memory) as most:
        out, err = process.communicate(json.dumps(request.to_dict()))
    if process.returncode == -signal.SIGKILL:
        raise UserError(
            f"compiling {request.config.name} for {request.topology} took more than {memory / 1e9:.1f} GB of this machine's memory and was "
            f"stopped; give it more with --memory_gb, or compile fewer layers apart (model.unroll=1, shorter model.first)"
        )
    lines = out.splitlines()
    if process.returncode or not lines:
        raise UserError(f"the compiler ended with code {process.returncode}: {_last(err)}")
    return json.loads(lines[-1]) | {"seconds": round(time.monotonic() - started, 1), "peak_gb": round(most[0] / 1e9, 2)}


def _last(err: str) -> str:
    """The last line that names an error, or else the last one."""
    lines = [line.strip() for line in err.splitlines() if line.strip()]
    return ([line for line in lines if "Error" in line] or lines or ["no message"])[-1][:500]


@contextlib.contextmanager
def _watched(process: subprocess.Popen, limit: int) -> Iterator[list[int]]:
    """Kills a process that grows past the limit, before the system kills one of its choice; and measures the most it took."""
    most, done = [0], threading.Event()

    def watch() -> None:
        page = os.sysconf("SC_PAGE_SIZE")
        while not done.wait(0.2):
            with contextlib.suppress(OSError, ValueError, IndexError):
                most[0] = max(most[0], page * int(Path(f"/proc/{process.pid}/statm").read_text().split()[1]))
            if most[0] > limit:
                process.kill()
                return

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield most
    finally:
        done.set()
        watcher.join()
        if process.poll() is None:
            process.kill()
