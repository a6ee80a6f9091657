"""Trains a sparse model and its dense twin of equal active FLOPs side by side, at equal steps and at equal time, and
says in one table and one page what the experts bought. The same command goes on where it was stopped.

Example: python scripts/compare.py --workdir=runs/tiny
         python scripts/compare.py --workdir=runs/tiny_seeds --seeds=0,1,2 --config.train.steps=1000

The config file must know the variants `sparse` and `dense`. Options --config.key=value go to every run.
"""

from __future__ import annotations

import json
from pathlib import Path

from absl import flags

from moejax import cli
from moejax.errors import UserError
from moejax.report import runs, table, twins

FILE = flags.DEFINE_string("file", "configs/tiny.py", "experiment file with the variants sparse and dense")
WORKDIR = flags.DEFINE_string("workdir", None, "folder of the runs")
SEEDS = flags.DEFINE_list("seeds", ["0"], "seeds, each a comparison of its own; with several a summary follows")
JSON = flags.DEFINE_bool("json", False, "print the numbers of the table as JSON at the end")


def main(arguments: list[str]) -> None:
    overrides = [argument for argument in arguments if argument.startswith("--config.")]
    if len(overrides) < len(arguments):
        raise UserError(f"unexpected argument {arguments[0]!r}; options are written --name=value; see --help")
    if WORKDIR.value is None:
        raise UserError("--workdir is missing; for example --workdir=runs/tiny")
    if not all(seed.isdigit() for seed in SEEDS.value):
        raise UserError(
            f"--seeds={','.join(SEEDS.value)}: whole numbers with commas between; for example --seeds=0,1,2"
        )
    root = Path(WORKDIR.value).expanduser()
    found = []
    for seed in SEEDS.value:
        folder = root if len(SEEDS.value) == 1 else root / f"seed{seed}"
        workdirs = twins.train(
            FILE.value, folder, [*overrides, f"--config.train.seed={seed}", f"--config.data.seed={seed}"]
        )
        found.append([runs.load(workdir) for workdir in workdirs])
        print(json.dumps(table.numbers(found[-1]), indent=1) if JSON.value else table.text(found[-1]), flush=True)
    if len(found) > 1:
        print(json.dumps(twins.summary(found), indent=1) if JSON.value else twins.summary_text(found))
    from moejax.report import page  # matplotlib is an extra, and the table does not need it

    page.write(found[0], root / "report.html")
    print(f"the report is {root / 'report.html'}")


if __name__ == "__main__":
    cli.run(main, rest="all")
