"""The folder of a run: its resolved config, what it ran on, and its logs. A resume continues the same files."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
from tensorboardX import SummaryWriter

from moejax import config
from moejax.errors import ConfigError
from moejax.train.lease import Lease

MAY_CHANGE = (
    "mesh.",
    "checkpoint.",
    "train.microbatches",
    "train.profile_",
    "data.cache",
    "train.log_every",
    "train.record_every",
    "train.replicas_every",
    "watchdog.",
    "faults.",
)
"""Options that a resumed run may have other values of: they do not change what is learned."""


class Workdir:
    """Files of one run. On all hosts but the first it writes nothing."""

    def __init__(self, path: str, cfg: config.Config, *, primary: bool):
        self.path = Path(path).expanduser()
        self.primary = primary
        self._lease: Lease | None = None
        self._claim(cfg)
        self._tensorboard = SummaryWriter(str(self.path / "tensorboard")) if primary else None

    def _claim(self, cfg: config.Config) -> None:
        """Makes the folder, or checks that it belongs to this config."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            known = (
                json.loads((self.path / "config.json").read_text()) if (self.path / "config.json").exists() else None
            )
        except OSError as error:
            raise ConfigError(
                f"workdir {self.path} cannot be written: {error.strerror}; choose another --workdir"
            ) from error
        except json.JSONDecodeError as error:
            raise ConfigError(f"{self.path / 'config.json'} is not JSON ({error}); choose another --workdir") from error
        now = json.loads(json.dumps(config.to_dict(cfg)))
        changes = [] if known is None else differences(with_defaults(known), now)
        if changes:
            raise ConfigError(
                f"workdir {self.path} holds a run with another config ({'; '.join(changes[:3])}); "
                "choose another --workdir, or give the options of that run to continue it"
            )
        if self.primary:
            self._hold(known is None, now)

    def _hold(self, new: bool, cfg: dict[str, Any]) -> None:
        """Takes the lease; a new folder gets its config."""
        try:
            self._lease = Lease(self.path)
            if new:
                write_json(self.path / "config.json", cfg)
        except OSError as error:
            raise ConfigError(
                f"workdir {self.path} cannot be written: {error.strerror}; choose another --workdir"
            ) from error
        if self._lease.taken_from is not None:
            self.event("lease taken over", of=self._lease.taken_from)

    def held(self) -> bool:
        """Whether the folder is still this run's, as far as this process knows: another may have thought it dead."""
        return self._lease is None or not self._lease.lost()

    def last_step(self) -> int:
        """The last step that metrics.jsonl has a line of; 0 for none."""
        return max((line["step"] for line in read_lines(self.path / "metrics.jsonl")), default=0)

    def truncate(self, step: int) -> None:
        """Forgets lines of later steps and of the end, so that a resumed run leaves what an undisturbed one would."""
        if not self.primary:
            return
        for name in ("metrics.jsonl", "timing.jsonl"):
            file = self.path / name
            kept = [line for line in read_lines(file) if line["step"] <= step and not _is_final(line)]
            _replace(file, "".join(json.dumps(line) + "\n" for line in kept))

    def log(self, step: int, numbers: dict[str, float | int], file: str = "metrics.jsonl") -> None:
        """One line of named numbers, also to TensorBoard."""
        if not self.primary:
            return
        with open(self.path / file, "a") as out:
            out.write(json.dumps({"step": step, **numbers}) + "\n")
        if self._tensorboard is not None:
            for name, value in numbers.items():
                self._tensorboard.add_scalar(name, value, step)

    def event(self, what: str, **details: Any) -> None:
        """One line of events.jsonl: what happened to the run."""
        if self.primary:
            with open(self.path / "events.jsonl", "a") as out:
                out.write(json.dumps({"event": what, "time": round(time.time(), 3), **details}) + "\n")

    def ledger(self, step: int, seconds: dict[str, float]) -> None:
        """How long this process has spent in each section, up to a step that is saved."""
        self.event("ledger", step=step, seconds={name: round(value, 3) for name, value in seconds.items()})

    def save_routing(self, name: str, layers: dict[str, dict[str, np.ndarray]]) -> None:
        """routing/NAME.npz: every sum of every sparse layer, `KIND.NAME` -> [layers, ...]."""
        if self.primary and layers:
            (self.path / "routing").mkdir(exist_ok=True)
            arrays = {f"{kind}.{name}": value for kind, stats in layers.items() for name, value in stats.items()}
            np.savez_compressed(self.path / "routing" / f"{name}.npz", **arrays)

    def save_probe(self, step: int, probe: dict[str, np.ndarray]) -> None:
        """routing/probe_STEP.npz: the experts of the fixed probe rows."""
        if self.primary and probe:
            (self.path / "routing").mkdir(exist_ok=True)
            np.savez_compressed(self.path / "routing" / f"probe_{step:08d}.npz", **probe)

    def write(self, name: str, tree: dict[str, Any]) -> None:
        if self.primary:
            write_json(self.path / name, tree)

    def close(self) -> None:
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._lease is not None:
            self._lease.release()


def _is_final(line: dict[str, Any]) -> bool:
    """The full held-out evaluation, which the end of the run makes again."""
    return any(name.startswith("heldout") for name in line)


def read_lines(file: Path) -> list[dict[str, Any]]:
    """The lines of a jsonl file; a last line cut short by a crash is left out."""
    lines = []
    for line in file.read_text().splitlines() if file.exists() else ():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return lines


def write_json(file: Path, tree: dict[str, Any]) -> None:
    _replace(file, json.dumps(tree, indent=2) + "\n")


def _replace(file: Path, text: str) -> None:
    """Writes beside the file and renames, so that a crash leaves the old text or the new."""
    beside = file.with_name(f".{file.name}.{os.getpid()}")
    beside.write_text(text)
    os.replace(beside, file)


def with_defaults(known: dict[str, Any]) -> dict[str, Any]:
    """A config that was written when there were fewer options: the others had their defaults."""

    def fill(default: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
        return {
            key: fill(default[key], value) if isinstance(value, dict) and isinstance(default.get(key), dict) else value
            for key, value in (default | given).items()
        }

    return fill(json.loads(json.dumps(config.to_dict(config.Config()))), known)


def differences(old: dict[str, Any], new: dict[str, Any], path: str = "") -> list[str]:
    """`key: old -> new` for every option that differs and may not."""
    found = []
    for key in sorted({*old, *new}):
        here = f"{path}{key}"
        left, right = old.get(key), new.get(key)
        if isinstance(left, dict) and isinstance(right, dict):
            found += differences(left, right, f"{here}.")
        elif left != right and not here.startswith(MAY_CHANGE):
            found.append(f"{here}: {left} -> {right}")
    return found
