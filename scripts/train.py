"""Trains the experiment of a config file; the same command in the same workdir resumes.

Example: python scripts/train.py --config=configs/tiny.py --workdir=runs/tiny --config.model.moe.num_experts=8
"""

from __future__ import annotations

import json

from absl import flags

from moejax import cli, memory
from moejax.errors import UserError
from moejax.train import hosts, loop

CONFIG = cli.config_flag()
WORKDIR = flags.DEFINE_string("workdir", None, "folder of the run: made if it is missing, continued if it is not")
JSON = flags.DEFINE_bool("json", False, "print the held-out numbers as JSON and nothing else")
COORDINATOR = flags.DEFINE_string("coordinator", None, "address:port of process 0, for a run of several processes")
PROCESSES = flags.DEFINE_integer("processes", 1, "number of processes")
PROCESS = flags.DEFINE_integer("process", 0, "number of this process, from 0")


def main() -> None:
    cfg = cli.resolved(CONFIG)
    if WORKDIR.value is None:
        raise UserError("--workdir is missing; for example --workdir=runs/tiny")
    if COORDINATOR.value is not None:
        hosts.join(COORDINATOR.value, PROCESSES.value, PROCESS.value)
    memory.keep_freed()
    numbers = loop.train(cfg, WORKDIR.value, quiet=JSON.value)
    if JSON.value:
        print(json.dumps(numbers))


if __name__ == "__main__":
    cli.run(main)
