"""Runs the experiments of a sweep file, some at a time, or writes what a scheduler needs to run them; then puts their results in a table.

Example: python scripts/sweep.py --config=configs/sweeps/experts.py --engine=local --workdir=runs/experts --at_once=2

With local, the same command goes on where it was stopped or killed: finished runs are not repeated, failed ones are marked and started
again with --retry. The others schedule nothing: files for SLURM, SkyPilot or JobSet are written to --out, their options are
--set=KEY=VALUE, and --workdir is a folder as the nodes see it. Options --config.key=value go to every run. With --collect nothing is
started: the table of what there is.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from absl import flags

from moejax import cli
from moejax.errors import UserError
from moejax.sweep import engines, live, members, plan, results, states
from moejax.sweep.local import Local
from moejax.train.workdir import write_json

CONFIG = cli.config_flag()
WORKDIR = flags.DEFINE_string("workdir", None, "folder of the sweep; every run has a folder in it")
ENGINE = flags.DEFINE_enum("engine", "local", ["local", *engines.ENGINES], "who runs it: this machine, or a scheduler")
AT_ONCE = flags.DEFINE_integer("at_once", None, "runs at a time; without: one (local), all (slurm)", lower_bound=1)
OUT = flags.DEFINE_string("out", None, "folder for the files of a scheduler")
SET = flags.DEFINE_multi_string("set", [], "KEY=VALUE for a scheduler, such as time=04:00:00: docs/sweeps.md")
RETRY = flags.DEFINE_bool("retry", False, "start runs that failed, too (local)")
ENV = flags.DEFINE_multi_string(
    "env", [], "KEY=VALUE for the runs; local: {slot} is 0 to at_once - 1, as in CUDA_VISIBLE_DEVICES={slot}"
)
COLLECT = flags.DEFINE_bool("collect", False, "start nothing, read what there is")
X = flags.DEFINE_string("x", None, "option along the picture's horizontal axis, such as model.moe.num_experts")
Y = flags.DEFINE_string("y", "heldout/bits_per_byte", "number along the vertical axis")
BY = flags.DEFINE_string("by", None, "option whose values are lines of their own")
PICTURE = flags.DEFINE_string("picture", None, "file for the picture, a PNG; needs --x")
JSON = flags.DEFINE_bool("json", False, "print the results as JSON and nothing else")


def main() -> None:
    here = ENGINE.value == "local" or COLLECT.value
    _usage(here)
    root = Path(WORKDIR.value).expanduser()
    tree = cli.tree(CONFIG)
    found = plan.read(cli.config_file("config"), tree, cli.overrides(sys.argv), str(root))
    if not here:
        _write(found, Path(str(OUT.value)).expanduser())
        return
    members.conflicts(found.members, root)
    if not COLLECT.value:
        _run(found, root)
    _show(found, root)


def _usage(here: bool) -> None:
    """Raises UserError for flags that are missing, or that say nothing together."""
    if WORKDIR.value is None:
        raise UserError("--workdir is missing; for example --workdir=runs/experts")
    if "://" in WORKDIR.value:
        raise UserError(f"--workdir={WORKDIR.value}: runs write to folders; mount the bucket and give its path")
    if PICTURE.value and not X.value:
        raise UserError("--picture needs --x, an option of the sweep; for example --x=model.moe.num_experts")
    if here and (OUT.value or SET.value):
        raise UserError("--out and --set go with --engine=slurm, skypilot or jobset; leave them out, or give one")
    if not here and (RETRY.value or PICTURE.value or not OUT.value):
        raise UserError(
            f"--engine={ENGINE.value} takes --out, a folder such as runs/specs, and neither --retry nor --picture"
        )


def _write(found: plan.Plan, out: Path) -> None:
    """Files for a scheduler, and what to type next."""
    limit = [] if AT_ONCE.value is None else [f"at_once={AT_ONCE.value}"]
    environment = dict(_pair(text) for text in ENV.value)
    files, submit = engines.write(found, ENGINE.value, [*SET.value, *limit], environment, out)
    if JSON.value:
        print(json.dumps({"files": list(map(str, files)), "next": submit}, indent=1))
    else:
        print(f"{len(found.members)} runs, {len(files)} files in {out}; next, from moejax's folder:\n  {submit}")


def _run(found: plan.Plan, root: Path) -> None:
    """Every run of the sweep, on this machine."""
    train = str(Path(__file__).with_name("train.py"))
    environment = dict(_pair(text) for text in ENV.value)
    local = Local(
        found.members, root, lambda member: [sys.executable, train, *found.arguments(member)],
        at_once=AT_ONCE.value or 1, environment=environment, retry=RETRY.value,
    )  # fmt: skip
    with live.shown(found.members, quiet=JSON.value) as show:
        local.run(show)


def _pair(text: str) -> tuple[str, str]:
    key, given, value = text.partition("=")
    if not given or not key:
        raise UserError(f"--env={text}: KEY=VALUE; for example --env=CUDA_VISIBLE_DEVICES={{slot}}")
    return key, value


def _show(found: plan.Plan, root: Path) -> None:
    """The table, results.json, and the picture if one is asked for. Ends with 1 where a run failed."""
    now = states.of(root, found.members)
    each = results.rows(root, found.members, now)
    together = results.settings(each)
    if root.is_dir():
        write_json(
            root / "results.json", {"sweep": found.config, "common": found.common, "runs": each, "settings": together}
        )
    print(json.dumps({"runs": each, "settings": together}, indent=1) if JSON.value else results.text(together))
    if PICTURE.value:
        from moejax.sweep import picture  # matplotlib is an extra

        Path(PICTURE.value).write_bytes(picture.png(together, X.value, Y.value, BY.value))
    failed = [row for row in each if row["state"].startswith(states.FAILED)]
    for row in failed:
        print(f"{row['name']}: {row['state']}; see {root / row['folder'] / 'output.txt'}", file=sys.stderr)
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    cli.run(main)
