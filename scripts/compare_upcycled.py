"""Trains a dense model, upcycles it, and trains it on at equal compute: densely, with granular experts, with whole copies.

Says in one table and one picture when the sparse ones are ahead. The same command goes on where it was stopped.

Example: python scripts/compare_upcycled.py --workdir=runs/upcycled

Options --config.key=value go to every run.
"""

from __future__ import annotations

import json
from pathlib import Path

from absl import flags

from moejax import cli
from moejax.errors import UserError
from moejax.report import upcycled

FILE = flags.DEFINE_string(
    "file", "configs/upcycle.py", "experiment file with the variants base, dense, granular and copies"
)
WORKDIR = flags.DEFINE_string("workdir", None, "folder of the runs")
SEEDS = flags.DEFINE_list(
    "seeds", ["0"], "seeds of fresh routers and of the order of rows; each trains all branches from one base"
)
PICTURE = flags.DEFINE_string("picture", None, "file for the curves, a PNG; by default curves.png in the workdir")
JSON = flags.DEFINE_bool("json", False, "print the numbers as JSON at the end")


def main(arguments: list[str]) -> None:
    overrides = [argument for argument in arguments if argument.startswith("--config.")]
    if len(overrides) < len(arguments):
        raise UserError(f"unexpected argument {arguments[0]!r}; options are written --name=value; see --help")
    if WORKDIR.value is None:
        raise UserError("--workdir is missing; for example --workdir=runs/upcycled")
    if not SEEDS.value or not all(seed.isdigit() for seed in SEEDS.value):
        raise UserError(f"--seeds={','.join(SEEDS.value)}: whole numbers with commas between; for example --seeds=0,1")
    root = Path(WORKDIR.value).expanduser()
    base, found = upcycled.train(FILE.value, root, [int(seed) for seed in SEEDS.value], overrides)
    result = upcycled.numbers(base, found)
    (Path(PICTURE.value).expanduser() if PICTURE.value else root / "curves.png").write_bytes(upcycled.draw(base, found))
    print(json.dumps(result, indent=1) if JSON.value else upcycled.table(result))


if __name__ == "__main__":
    cli.run(main, rest="all")
