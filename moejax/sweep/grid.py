"""A sweep file -> the overrides of every run, in either dialect of ml_collections projects.

    def sweep(add):                                     def get_hyper(hyper):
        for seed in range(3):                               return hyper.product([
            add(**{"model.moe.top_k": 2,                        hyper.sweep("config.model.moe.top_k", [1, 2]),
                   "train.seed": seed})                         hyper.sweep("config.train.seed", range(3))])

The file is also an experiment file: its `get_config()` is what the overrides change. Keys may begin with `config.`.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from moejax.errors import ConfigError

Overrides = dict[str, Any]
"""Value by dotted option, without `config.`"""
Grid = list[Overrides]


def load(file: str) -> ModuleType:
    """The module of a sweep file."""
    spec = importlib.util.spec_from_file_location(Path(file).stem, file)
    if spec is None or spec.loader is None or not Path(file).is_file():
        raise ConfigError(f"--config={file}: no such Python file; configs/sweeps/ has examples")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def expand(module: ModuleType) -> Grid:
    """The overrides of every run, in order. Raises ConfigError for a file without a sweep, with two, or with an empty one."""
    dialects = [name for name in ("sweep", "get_hyper") if callable(getattr(module, name, None))]
    if len(dialects) != 1:
        raise ConfigError(
            f"{module.__file__} defines {' and '.join(dialects) or 'no sweep'}: a sweep file has one of sweep(add) and get_hyper(hyper)"
        )
    found = _added(module.sweep) if dialects == ["sweep"] else module.get_hyper(Hyper)
    if not found:
        raise ConfigError(f"{module.__file__}: {dialects[0]} gives no run; an empty sweep is sweep(add) with one add()")
    return list(found)


def _added(sweep: Any) -> Grid:
    found: Grid = []

    def add(overrides: Overrides | None = None, **more: Any) -> None:
        """One run."""
        found.append(_merged([_keyed(overrides or {}), _keyed(more)]))

    sweep(add)
    return found


class Hyper:
    """What `get_hyper` is given: sweeps are lists of overrides, and these put them together."""

    @staticmethod
    def sweep(key: str, values: Iterable[Any]) -> Grid:
        """A run for every value of one option."""
        return [_keyed({key: value}) for value in values]

    @staticmethod
    def fixed(key: str, value: Any, length: int = 1) -> Grid:
        """The same value, `length` times."""
        return [_keyed({key: value}) for _ in range(length)]

    @staticmethod
    def product(sweeps: Sequence[Grid]) -> Grid:
        """Every choice of one from each; the last varies fastest. Of no sweeps: one run without overrides."""
        return [_merged(choice) for choice in itertools.product(*sweeps)]

    @staticmethod
    def zipit(sweeps: Sequence[Grid]) -> Grid:
        """The first of each, the second of each, and so on; all of one length."""
        lengths = [len(sweep) for sweep in sweeps]
        if len(set(lengths)) > 1:
            raise ConfigError(f"zipit of sweeps of {lengths} runs: they go together one by one, so make them as long")
        return [_merged(parts) for parts in zip(*sweeps, strict=True)]

    @staticmethod
    def chainit(sweeps: Sequence[Grid]) -> Grid:
        """One after the other."""
        return list(itertools.chain(*sweeps))

    @staticmethod
    def discrete(values: Iterable[Any]) -> list[Any]:
        """The values as they are."""
        return list(values)

    categorical = discrete


def _keyed(overrides: Overrides) -> Overrides:
    return {key.removeprefix("config."): value for key, value in overrides.items()}


def _merged(parts: Sequence[Overrides]) -> Overrides:
    """One set of overrides; an option that two parts set is refused."""

    def both(a: Overrides, b: Overrides) -> Overrides:
        if twice := sorted(a.keys() & b.keys()):
            raise ConfigError(f"config.{twice[0]} is set twice in one run of the sweep; set it once")
        return a | b

    return functools.reduce(both, parts, {})
