"""A sweep as a whole: its file, what all runs share, its runs, and the command of each."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import ml_collections

from moejax.sweep import grid
from moejax.sweep.members import Member, members

TRAIN = "scripts/train.py"


@dataclasses.dataclass(frozen=True)
class Plan:
    """What an engine runs."""

    name: str
    """Of the sweep file, without folders and .py."""
    config: str
    """FILE.py[:VARIANT], as the command line has it."""
    common: tuple[str, ...]
    """--config.key=value for every run, as the command line has them."""
    members: tuple[Member, ...]
    root: str
    """Folder of the workdirs."""

    def workdir(self, member: Member) -> str:
        """Of one run; `root` may be a remote path."""
        return f"{self.root.rstrip('/')}/{member.folder}"

    def arguments(self, member: Member) -> list[str]:
        """What scripts/train.py is given."""
        return [f"--config={self.config}", *self.common, *member.options, f"--workdir={self.workdir(member)}"]


def read(config: str, tree: ml_collections.ConfigDict, common: Sequence[str], root: str) -> Plan:
    """The plan of a sweep file whose config, changed by `common`, is `tree`. Raises ConfigError for a run that cannot be run."""
    file = config.rsplit(":", 1)[0] if not config.endswith(".py") else config
    return Plan(Path(file).stem, config, tuple(common), tuple(members(tree, grid.expand(grid.load(file)))), root)
