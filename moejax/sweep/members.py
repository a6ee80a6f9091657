"""The runs of a sweep: each with a stable id, a name, and the command that makes it. All are checked before the first begins."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import ml_collections
import numpy as np

from moejax import config
from moejax.errors import ConfigError
from moejax.sweep.grid import Grid, Overrides
from moejax.train import check
from moejax.train.workdir import differences, with_defaults

LONGEST = 80
"""Characters of a name."""


@dataclasses.dataclass(frozen=True)
class Member:
    """One run."""

    id: str
    """Eight hexadecimal digits of what the sweep sets, whatever else it holds and in whatever order."""
    name: str
    """The options by their last names, for people; also config.name, unless the sweep sets that."""
    overrides: Overrides
    """Value by dotted option, `name` included."""
    config: config.Config

    @property
    def folder(self) -> str:
        """Of its workdir, in the sweep's."""
        return f"{self.name}-{self.id}"

    @property
    def options(self) -> list[str]:
        """The overrides as scripts/train.py takes them."""
        return [f"--config.{key}={_written(value)}" for key, value in self.overrides.items()]


def members(tree: ml_collections.ConfigDict, grid: Grid) -> list[Member]:
    """A member for every set of overrides of `tree`. Raises ConfigError, with the member's name, where one cannot be run."""
    found = [_member(tree, overrides) for overrides in grid]
    ids = [member.id for member in found]
    if twice := [member.name for member in found if ids.count(member.id) > 1]:
        raise ConfigError(f"{twice[0]} is in the sweep {twice.count(twice[0])} times; runs that are alike are one run")
    return found


def _member(tree: ml_collections.ConfigDict, overrides: Overrides) -> Member:
    overrides = {key: _plain(value) for key, value in overrides.items()}
    name = _slug(str(overrides["name"])) if "name" in overrides else name_of(overrides)
    changed = copy.deepcopy(tree)
    full = {"name": name} | overrides
    try:
        for key, value in full.items():
            _set(changed, key, value)
        cfg = config.resolve(changed)
        check.check(cfg)
    except ConfigError as error:
        raise ConfigError(f"run {name} of the sweep: {error}") from error
    return Member(id_of(overrides), name, full, cfg)


def id_of(overrides: Overrides) -> str:
    """The same for the same overrides in any order, in any version."""
    text = json.dumps(overrides, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def name_of(overrides: Overrides) -> str:
    """`num_experts=8_seed=1`: options by their last names; one value under the same last name is written once."""
    short = dict.fromkeys((key.rsplit(".", 1)[-1], _slug(_written(value))) for key, value in overrides.items())
    return "_".join(f"{key}={value}" for key, value in short)[:LONGEST].rstrip("_=-.") or "default"


def conflicts(found: Sequence[Member], root: Path) -> None:
    """Raises ConfigError where a workdir of the sweep holds a run with another config, as after other options for all."""
    for member in found:
        file = root / member.folder / "config.json"
        if not file.exists():
            continue
        wanted = json.loads(json.dumps(config.to_dict(member.config)))
        changes = differences(with_defaults(json.loads(file.read_text())), wanted)
        if changes:
            raise ConfigError(
                f"{file.parent} holds a run with another config ({'; '.join(changes[:3])}); choose another --workdir for this sweep"
            )


def _set(tree: ml_collections.ConfigDict, key: str, value: Any) -> None:
    """Sets a dotted option; what is no option is left for `config.resolve` to name."""
    *sections, last = key.split(".")
    for section in sections:
        if section not in tree or not isinstance(tree[section], ml_collections.ConfigDict):
            raise ConfigError(
                f"config.{key} is not an option: there is no section {section}; options are in moejax/config.py"
            )
        tree = getattr(tree, section)
    with tree.ignore_type(), tree.unlocked():
        tree[last] = value


def _plain(value: Any) -> Any:
    """Tuples for lists and other iterables: what JSON and a command line can say."""
    if isinstance(value, Iterable) and not isinstance(value, str):
        return tuple(_plain(item) for item in value)
    return value.item() if isinstance(value, np.generic) else value


def _written(value: Any) -> str:
    return value if isinstance(value, str) else repr(value)


def _slug(text: str) -> str:
    """Letters, digits and dots: what every file system and shell takes."""
    return re.sub(r"[^A-Za-z0-9.+=_]+", "-", text).strip("-")
