"""Reads every array of a run's checkpoints and compares it with the digest that was saved with it.

Example: python scripts/verify.py runs/tiny_sparse/checkpoints

One step alone: python scripts/verify.py runs/tiny_sparse/checkpoints/2000. Exit code 4 if one is not as it was saved. Nothing is
changed; it may run beside training.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from absl import flags

from moejax import cli, config
from moejax.checkpoint.manager import Checkpoints
from moejax.errors import DamagedError, UserError

JSON = flags.DEFINE_bool("json", False, "print what was found as JSON and nothing else")


def main(names: list[str]) -> None:
    if len(names) != 1:
        raise UserError(
            "name one folder of checkpoints, or one of its steps; for example python scripts/verify.py runs/tiny/checkpoints"
        )
    folder = Path(names[0]).expanduser().absolute()
    one = int(folder.name) if folder.name.isdigit() else None
    folder = folder.parent if one is not None else folder
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder; give the checkpoints folder of a workdir")
    rows = verify(folder, one)
    if JSON.value:
        print(json.dumps(rows, indent=1))
    else:
        for row in rows:
            found = "whole" if row["damage"] is None else row["damage"]
            print(f"step {row['step']:8}  {row['arrays']:5} arrays  {row['bytes'] / 1e6:10.1f} MB  {found}")
    damaged = [row["step"] for row in rows if row["damage"] is not None]
    if damaged:
        raise DamagedError(f"{len(damaged)} of {len(rows)} checkpoints in {folder} are damaged: steps {damaged}")


def verify(folder: Path, one: int | None) -> list[dict[str, Any]]:
    """A row for every step, or for one."""
    checkpoints = Checkpoints(folder, config.Checkpoint())
    steps = checkpoints.steps() if one is None else [one]
    if not steps or (one is not None and one not in checkpoints.steps()):
        raise UserError(
            f"{folder} has no checkpoint{'' if one is None else f' of step {one}'}; steps there: {checkpoints.steps()}"
        )
    rows = []
    for step in steps:
        try:
            arrays, damage = checkpoints.load_arrays(step), None
        except DamagedError as error:
            arrays, damage = {}, str(error)
        rows.append(
            {"step": step, "arrays": len(arrays), "bytes": sum(a.nbytes for a in arrays.values()), "damage": damage}
        )
    checkpoints.close()
    return rows


if __name__ == "__main__":
    cli.run(main, rest="names")
