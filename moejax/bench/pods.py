"""The table of docs/pods.md: published models on the smallest slice that holds their training step, and on the next that has room to spare
and is faster by the estimate.

Every step is compiled; nothing runs. Meshes are the best by the estimate (`plan.search`), microbatches the fewest that fit by it. Models
whose layers are not built are counted. Answers of the compiler are kept, so a run that was cut short goes on where it was.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moejax import config
from moejax.errors import ConfigError, UserError
from moejax.plan import account, aot, hardware, planned, pods, search, tables

CHIP = "v5p"
MODELS = ("mixtral_8x7b", "qwen3_30b_a3b", "gpt_oss_120b", "deepseek_v3", "kimi_k2", "switch_c")
SPARE = 0.25
"""Share of a device's memory that the recommended slice leaves free, by the estimate."""
CACHE = Path("~/.cache/moejax/plan")


def run(cfg: config.Config, rounds: int) -> dict[str, Any]:
    """Two rows for each built model, one for each that is counted. `cfg` and `rounds` play no part: a compiler always says the same."""
    rows = [row for name in MODELS for row in of_model(name)]
    return {"command": " ".join(sys.argv), "chip": CHIP, "versions": aot.versions(aot.libtpu()), "rows": rows}


def of_model(name: str) -> list[dict[str, Any]]:
    """Rows of one model."""
    tree = planned.load(str(planned.MODELS / f"{name}.py"))
    head = {"model": name, **planned.totals(account.of_tree(tree))}
    if config.COUNTED in tree:
        return [head | {"kind": "accounted, not compiled"}]
    cfg = config.resolve(tree)
    smallest = _smallest(cfg)
    for topology in hardware.topologies(CHIP):
        best = _best(cfg, topology, SPARE) if topology.chips > smallest["chips"] else None
        if best is not None and _seconds(best.roofline.to_dict()) < _seconds(smallest["roofline"]):
            larger = pods.facts(_asked(best), "the best by the estimate")
            return [head | {"kind": "smallest"} | smallest, head | {"kind": "recommended"} | larger]
    return [head | {"kind": "smallest, and no larger one is faster"} | smallest]


def _seconds(bounds: Mapping[str, Any]) -> float:
    """The least a step takes where everything overlaps."""
    return bounds["seconds"]["overlapped"]


def _smallest(cfg: config.Config) -> dict[str, Any]:
    """The first slice on which the compiled step fits."""
    for topology in hardware.topologies(CHIP):
        best = _best(cfg, topology, 0.0)
        if best is None:
            continue
        print(f"compiling {cfg.name} for {topology.name}, {pods.search_line(best)}", file=sys.stderr, flush=True)
        found = pods.facts(_asked(best), "the best by the estimate")
        if found["fits"]:
            return found
    raise UserError(f"{cfg.name} fits no slice of {CHIP}")


def _best(cfg: config.Config, topology: hardware.Topology, spare: float) -> search.Candidate | None:
    """The best mesh by the estimate that leaves so much memory free; None where none does."""
    try:
        every = search.search(cfg, topology, spare=spare)
    except ConfigError:  # no mesh of so many devices
        return None
    return next((c for c in every if c.fits and c.used <= (1 - spare) * topology.chip.usable), None)


def _asked(best: search.Candidate) -> pods.Asked:
    return pods.Asked(best.config, best.topology, best.slices, cache=CACHE.expanduser())


def table(result: dict[str, Any]) -> str:
    """The numbers for a person."""
    built = [row for row in result["rows"] if "fits" in row]
    lines = [tables.of_plans([row | {"topology": f"{row['model']} {row['topology']}"} for row in built])]
    lines += [
        f"{row['model']}: {row['total_parameters']:,} parameters, {row['active_parameters']['A']:,} active; {row['kind']}"
        for row in result["rows"]
        if "fits" not in row
    ]
    return "\n".join(lines)
