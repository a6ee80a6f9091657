"""Times parts of the library against what they should be compared with, in turn within one run.

    layer        the sparse layer against the dense twin of equal active FLOPs and against its own matmuls
    routers      every router in the default experiment, cut short: loss, drops, load (half an hour)
    balancers    every balancer: steps to even out a skewed router, loss at equal budget, overhead (half an hour)
    statistics   the train step with its statistics against the step without
    meshes       the experiment on one device, six meshes and two processes: losses and flipped assignments (half an hour)
    transport    every transport on eight devices: time, bytes, drops and rounds, by experts, their spread and the routing

Example: python scripts/bench.py layer --config=configs/tiny.py --json
"""

from __future__ import annotations

import json
from pathlib import Path

from absl import flags

from moejax import cli, config
from moejax.bench import balancers, layer, meshes, routers, statistics, transport
from moejax.errors import UserError
from moejax.train import check

CONFIG = cli.config_flag()
JSON = flags.DEFINE_bool("json", False, "print the numbers as JSON")
ROUNDS = flags.DEFINE_integer("rounds", 30, "times each function is run", lower_bound=1)

PICTURE = flags.DEFINE_string("picture", None, "file for the bench's picture, a PNG (meshes)")

BENCHES = {
    "layer": layer,
    "meshes": meshes,
    "routers": routers,
    "balancers": balancers,
    "statistics": statistics,
    "transport": transport,
}


def main(names: list[str]) -> None:
    if len(names) != 1 or names[0] not in BENCHES:
        raise UserError(f"name one bench of: {', '.join(BENCHES)}; for example python scripts/bench.py layer")
    cfg = config.Config() if CONFIG.value is None else cli.resolved(CONFIG)
    check.check(cfg)
    bench = BENCHES[names[0]]
    if PICTURE.value is not None and not hasattr(bench, "draw"):
        raise UserError(f"--picture={PICTURE.value}: bench {names[0]} draws none; leave it out")
    result = bench.run(cfg, ROUNDS.value)
    if PICTURE.value is not None:
        Path(PICTURE.value).expanduser().write_bytes(bench.draw(result))
    print(json.dumps(result, indent=1) if JSON.value else bench.table(result))


if __name__ == "__main__":
    cli.run(main, rest="names")
