"""Runs the experiments of a sweep file, some at a time, or writes what a scheduler needs to run them; then puts their results in a table.

Example: python scripts/sweep.py --config=configs/sweeps/experts.py --engine=local --workdir=runs/experts --at_once=2

The same command goes on where it was stopped or killed: finished runs are not repeated, failed ones are marked and started again
with --retry. Options --config.key=value go to every run. With --collect nothing is started: the table of what there is.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from absl import flags

from moejax import cli
from moejax.errors import UserError
from moejax.sweep import live, members, plan, results, states
from moejax.sweep.local import Local
from moejax.train.workdir import write_json

CONFIG = cli.config_flag()
WORKDIR = flags.DEFINE_string("workdir", None, "folder of the sweep; every run has a folder in it")
ENGINE = flags.DEFINE_enum("engine", "local", ["local"], "who runs it: this machine, or a scheduler")
AT_ONCE = flags.DEFINE_integer("at_once", 1, "runs at a time", lower_bound=1)
RETRY = flags.DEFINE_bool("retry", False, "start runs that failed, too (local)")
ENV = flags.DEFINE_multi_string(
    "env", [], "KEY=VALUE for the runs, {slot} is 0 to at_once - 1: CUDA_VISIBLE_DEVICES={slot} (local)"
)
COLLECT = flags.DEFINE_bool("collect", False, "start nothing, read what there is")
X = flags.DEFINE_string("x", None, "option along the picture's horizontal axis, such as model.moe.num_experts")
Y = flags.DEFINE_string("y", "heldout/bits_per_byte", "number along the vertical axis")
BY = flags.DEFINE_string("by", None, "option whose values are lines of their own")
PICTURE = flags.DEFINE_string("picture", None, "file for the picture, a PNG; needs --x")
JSON = flags.DEFINE_bool("json", False, "print the results as JSON and nothing else")


def main() -> None:
    if WORKDIR.value is None:
        raise UserError("--workdir is missing; for example --workdir=runs/experts")
    if PICTURE.value and not X.value:
        raise UserError("--picture needs --x, an option of the sweep; for example --x=model.moe.num_experts")
    root = Path(WORKDIR.value).expanduser()
    tree = cli.tree(CONFIG)
    found = plan.read(cli.config_file("config"), tree, cli.overrides(sys.argv), str(root))
    members.conflicts(found.members, root)
    if not COLLECT.value:
        _run(found, root)
    _show(found, root)


def _run(found: plan.Plan, root: Path) -> None:
    """Every run of the sweep, on this machine."""
    train = str(Path(__file__).with_name("train.py"))
    environment = dict(_pair(text) for text in ENV.value)
    local = Local(
        found.members, root, lambda member: [sys.executable, train, *found.arguments(member)],
        at_once=AT_ONCE.value, environment=environment, retry=RETRY.value,
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
