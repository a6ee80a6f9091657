"""Makes the start of a new run from the last checkpoint of another: dense to sparse, more experts, fewer, or in another order.

    upcycle   dense layers become experts that are copies of them, or of parts (model.moe.hidden below model.hidden); --noise
    grow      every expert equally often, to model.moe.num_experts
    prune     the experts of --experts, or of every layer the busiest on held-out text
    merge     means of neighbouring experts
    permute   experts in the order of --experts
    restart   the same model with a fresh schedule: what the others are compared with

Steps and schedule begin at 0, optimiser moments go along, and scripts/train.py with the same --config and --workdir trains on. It
says whether the new model computes the same function, and why.

Example: python scripts/surgery.py --operation=upcycle --from=runs/tiny_dense --config=configs/tiny.py --workdir=runs/tiny_upcycled
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags

from moejax import cli, config, mesh
from moejax.checkpoint import regroup, surgery, upcycle
from moejax.checkpoint.manager import flatten, unflatten
from moejax.checkpoint.surgery import Surgery
from moejax.errors import UserError
from moejax.report import runs
from moejax.train import check, saved, starts, state

CONFIG = cli.config_flag()
OPERATION = flags.DEFINE_string("operation", None, "upcycle, grow, prune, merge, permute or restart")
FROM = flags.DEFINE_string("from", None, "workdir of the run whose last checkpoint is read")
WORKDIR = flags.DEFINE_string("workdir", None, "folder of the new run: it must hold none yet")
EXPERTS = flags.DEFINE_list("experts", None, "numbers of experts, the same for all layers (prune, permute)")
NOISE = flags.DEFINE_float(
    "noise", 0.0, "standard deviation of noise on experts, in that of their weights (upcycle)", 0.0
)
SEED = flags.DEFINE_integer("seed", 0, "of the noise", 0)
MOMENTS = flags.DEFINE_bool("moments", True, "take the optimiser's moments along")
JSON = flags.DEFINE_bool("json", False, "print what was done as JSON")


def begun(cfg: config.Config) -> state.TrainState:
    """Step 0 of a config on one device, whatever its mesh."""
    alone = dataclasses.replace(cfg, mesh=config.Mesh())
    on = mesh.make(alone.mesh, jax.devices()[:1])
    with jax.set_mesh(on):
        return state.create(state.build(alone, on))


def _on_host(tree: Any) -> dict[str, np.ndarray]:
    return {path: np.asarray(leaf) for path, leaf in flatten(tree).items()}


# ---- the operations -----------------------------------------------------------------------------------------------


def _upcycle(source: config.Model, target: config.Model) -> Surgery:
    return upcycle.upcycle(source, target, noise=NOISE.value, seed=SEED.value, moments=MOMENTS.value)


def _prune(source: config.Model, target: config.Model) -> Surgery:
    return regroup.prune(source, target, _experts() or _busiest(target.moe.num_experts), moments=MOMENTS.value)


def _merge(source: config.Model, target: config.Model) -> Surgery:
    groups = regroup.neighbours(source.moe.num_experts, target.moe.num_experts)
    return regroup.merge(source, target, groups, moments=MOMENTS.value)


def _permute(source: config.Model, target: config.Model) -> Surgery:
    order = _experts()
    if order is None:
        raise UserError(
            "--operation=permute needs --experts: the old numbers in the new order, such as --experts=3,2,1,0"
        )
    return regroup.permute(source, target, order, moments=MOMENTS.value)


OPERATIONS: dict[str, Callable[[config.Model, config.Model], Surgery]] = {
    "upcycle": _upcycle,
    "grow": lambda source, target: regroup.grow(source, target, moments=MOMENTS.value),
    "prune": _prune,
    "merge": _merge,
    "permute": _permute,
    "restart": lambda source, target: surgery.restart(source, target, moments=MOMENTS.value),
}
TAKES = {"experts": ("prune", "permute"), "noise": ("upcycle",), "seed": ("upcycle",)}
"""Options that only some operations read."""


def _experts() -> list[list[int]] | None:
    """--experts as one row for all layers."""
    if EXPERTS.value is None:
        return None
    if not all(e.isdigit() for e in EXPERTS.value):
        raise UserError(
            f"--experts={','.join(EXPERTS.value)}: whole numbers with commas between, such as --experts=0,2,5"
        )
    return [[int(e) for e in EXPERTS.value]]


def _busiest(number: int) -> list[list[int]]:
    """Of every layer the experts with the largest load on the text that the run counted last."""
    load = runs.load(Path(FROM.value).expanduser()).routing.get("sparse", {}).get("load")
    if load is None:
        raise UserError(f"--from={FROM.value} has counted no load of experts; name those to keep with --experts")
    return regroup.busiest(load.tolist(), number)


def main() -> None:
    cfg = cli.resolved(CONFIG)
    for name, value in (("operation", OPERATION.value), ("from", FROM.value), ("workdir", WORKDIR.value)):
        if value is None:
            raise UserError(f"--{name} is missing; see --help for an example")
    if OPERATION.value not in OPERATIONS:
        raise UserError(f"--operation={OPERATION.value}: choose one of {', '.join(OPERATIONS)}")
    for name, readers in TAKES.items():
        if flags.FLAGS[name].present and OPERATION.value not in readers:
            raise UserError(
                f"--{name} does nothing with --operation={OPERATION.value}; it is for {' and '.join(readers)}"
            )
    check.check(cfg)
    source, workdir = Path(FROM.value).expanduser(), Path(WORKDIR.value).expanduser()
    starts.require_new(workdir)
    before, step, old = saved.read_arrays(source, "--from")
    made = OPERATIONS[OPERATION.value](before.model, cfg.model)
    own = begun(cfg)
    new = made(old, _on_host(own))
    facts = {
        "operation": made.name, "from": str(source), "from_step": step, "preserves": made.preserves, "why": made.why,
        "parameters": {"before": _parameters(old), "after": _parameters(new)},
    }  # fmt: skip
    placed = jax.tree.map(lambda new, old: jax.device_put(new, old.sharding), unflatten(new, own), own)
    starts.write(workdir, cfg, placed, "surgery", **facts)
    print(json.dumps(facts, indent=1) if JSON.value else _said(facts, workdir))


def _parameters(flat: Mapping[str, Any]) -> int:
    return sum(int(x.size) for path, x in flat.items() if path.startswith("parameters/"))


def _said(facts: dict[str, Any], workdir: Path) -> str:
    number = facts["parameters"]
    same = "the same function" if facts["preserves"] else "another function"
    return "\n".join(
        (
            f"{facts['operation']} of {facts['from']}, step {facts['from_step']}: {number['before']:,} -> {number['after']:,} parameters",
            f"{same}: {facts['why']}",
            f"scripts/train.py with the same --config and --workdir={workdir} trains on from step 0",
        )
    )


if __name__ == "__main__":
    cli.run(main)
