"""Measures tile sizes of the expert kernels on the accelerator of this machine, and keeps the fastest in moejax/kernels/tuned.json.

Example: python scripts/tune.py --shapes=qwen3_30b,deepseek_v3 --rounds=20

A program compiled later for this kind of chip and these sizes takes them; any other gets the static rule. Entries are added to
--table as they are found, so a run that is cut short keeps what it has; a problem measured again replaces its entry.
"""

from __future__ import annotations

import json
from pathlib import Path

import jax
from absl import flags

from moejax import cli
from moejax.bench import tune
from moejax.bench.shapes import SHAPES
from moejax.errors import UserError
from moejax.kernels import chips, tuned

SHAPES_FLAG = flags.DEFINE_list("shapes", sorted(SHAPES), "layers of moejax/bench/shapes.py")
ROUNDS = flags.DEFINE_integer("rounds", 20, "samples of each candidate, all in turn", lower_bound=1)
TABLE = flags.DEFINE_string("table", str(tuned.TABLE), "file that is added to")
JSON = flags.DEFINE_bool("json", False, "print the entries as JSON and nothing else")


def main() -> None:
    kind = jax.devices()[0].device_kind
    chip = chips.of(kind)
    if chip is None:
        raise UserError(f"nothing to tune on {kind!r}: the kernels are for {', '.join(chips.KINDS)}")
    unknown = [name for name in SHAPES_FLAG.value if name not in SHAPES]
    if unknown:
        raise UserError(f"--shapes: {unknown[0]!r} is not one of {', '.join(SHAPES)}")
    table = Path(TABLE.value).expanduser()
    entries = json.loads(table.read_text()) if table.exists() else []
    found = []
    for entry in tune.each(chip, [SHAPES[name] for name in SHAPES_FLAG.value], ROUNDS.value):
        found.append(entry)
        entries = tuned.merge(entries, [entry])
        tuned.write(table, entries)
        if not JSON.value:
            print(tune.line(entry), flush=True)
    if JSON.value:
        print(json.dumps(found, indent=1))


if __name__ == "__main__":
    cli.run(main)
