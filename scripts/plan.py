"""What a model costs on a pod that was not rented yet: parameters, FLOPs, bytes; whether its step fits, what it sends, what bounds it.

Example: python scripts/plan.py --config=configs/models/deepseek_v3.py --topology=v5p:8x8x8 --mesh=fsdp=8,expert=64

    without --topology        parameters, FLOPs and bytes, on any machine in a second
    --topology=A,B            compiles the step for each TPU slice, on a machine without one (needs libtpu: make tpu)
    --search=3                tries every mesh, compiles the best three by the estimate, ranks them with reasons
    --serving=v5e             weights, chips, bytes per token at batch 1 and 128; with --price the cost of a million tokens
    --compare=CONFIG          the config, a dense model, beside a sparse one: what introductions print, and what comes out

Nothing is run. Compiled programs are kept under --cache and read again while config, versions and code stay the same.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from absl import flags

from moejax import cli, config
from moejax import mesh as meshes
from moejax.errors import ConfigError
from moejax.plan import account, costs, hardware, introduction, planned, pods, serving, skew, tables
from moejax.plan.programs import STEPS

CONFIG = cli.config_flag()
TOPOLOGY = flags.DEFINE_list("topology", [], "TPU slices to compile for, such as v5p:8x8x8, in chips")
SLICES = flags.DEFINE_integer("slices", 1, "slices of each, joined by the data-centre network", 1)
MESH = flags.DEFINE_string(
    "mesh", None, "sizes of mesh axes, such as fsdp=8,expert=64; without it the config's, or one is chosen"
)
STEP = flags.DEFINE_enum("step", "train", list(STEPS), "what is compiled")
SEARCH = flags.DEFINE_integer("search", 0, "meshes to compile of all that there are; 0 for no search", 0)
LOADS = flags.DEFINE_string("loads", None, "routing/STEP.npz of a run: how evenly experts were taken")
SERVING = flags.DEFINE_string("serving", None, "chip to serve on, such as v5e or h100")
CONTEXT = flags.DEFINE_integer("context", None, "positions of a served sequence; by default the config's", 1)
PRICE = flags.DEFINE_float("price", None, "of a chip for an hour, in any currency (serving)", 0.0)
API_PRICE = flags.DEFINE_float("api_price", None, "of a million generated tokens elsewhere (serving)", 0.0)
COMPARE = flags.DEFINE_string("compare", None, "experiment file of a sparse model, beside --config, a dense one")
CACHE = flags.DEFINE_string("cache", "~/.cache/moejax/plan", "folder of compiled answers; empty for none")
MEMORY = flags.DEFINE_float(
    "memory_gb", None, "of this machine that the compiler may take; by default what is free, less one", 0.0
)
JSON = flags.DEFINE_bool("json", False, "print the numbers as JSON and nothing else")


def main() -> None:
    tree: Any = cli.tree(CONFIG)
    counted = account.of_tree(tree)
    name, context = tree.name, CONTEXT.value or tree.data.context
    found = {"name": name, **planned.totals(counted), "account": account.to_dict(counted, context)}
    shown = [tables.of_account(name, counted, context)]
    for part in (serve, compare, compile_for):
        numbers, text = part(tree, counted, context)
        found |= numbers
        shown += text
    print(json.dumps(found, indent=1) if JSON.value else "\n\n".join(shown))


def serve(tree: Any, counted: account.Account, context: int) -> tuple[dict[str, Any], list[str]]:
    """The serving column, beside dense twins."""
    if SERVING.value is None:
        if PRICE.value is not None or API_PRICE.value is not None:
            raise ConfigError("--price and --api_price are of serving: add --serving=CHIP, for example --serving=v5e")
        return {}, []
    rows = serving.with_twins(tree.name, counted, hardware.chip(SERVING.value), serving.USUAL._replace(context=context))
    priced = [] if PRICE.value is None else [costs.of_serving(row, PRICE.value, API_PRICE.value) for row in rows]
    text = [serving.table(rows), *([costs.table(priced)] if priced else [])]
    return {"serving": [r.to_dict() for r in rows], "costs": [c.to_dict() for c in priced]}, text


def compare(tree: Any, counted: account.Account, context: int) -> tuple[dict[str, Any], list[str]]:
    """What introductions print of a dense and a sparse model."""
    if COMPARE.value is None:
        return {}, []
    other = planned.load(COMPARE.value)
    sides = introduction.model(tree.name, counted), introduction.model(other.name, account.of_tree(other))
    chip, setting = hardware.chip(SERVING.value or "h100"), introduction.USUAL._replace(context=context)
    made = introduction.compare(*sides, chip, setting, planned.named_copies())
    return {"comparison": made.to_dict()}, [introduction.table(made)]


def compile_for(tree: Any, counted: account.Account, context: int) -> tuple[dict[str, Any], list[str]]:
    """The step on every topology."""
    if not TOPOLOGY.value:
        if SEARCH.value or MESH.value or LOADS.value or SLICES.value > 1 or STEP.value != "train":
            raise ConfigError(
                "--search, --mesh, --loads, --slices and --step are of a topology: add --topology, for example --topology=v5p:2x2x2"
            )
        return {}, []
    if config.COUNTED in tree:
        raise ConfigError(
            f"{tree.name}: this architecture is counted, not built, so no step of it can be compiled; leave out --topology, or choose "
            f"a config without the section {config.COUNTED}"
        )
    if SEARCH.value and (MESH.value or STEP.value != "train"):
        raise ConfigError(
            f"--search={SEARCH.value} tries every mesh for training; leave out --mesh and --step={STEP.value}"
        )
    cfg = config.resolve(tree)
    if MESH.value is not None:
        cfg = dataclasses.replace(cfg, mesh=parse_mesh(MESH.value))
    loads = skew.read(Path(LOADS.value).expanduser()) if LOADS.value else None
    cache = Path(CACHE.value).expanduser() if CACHE.value else None
    room = int(1e9 * MEMORY.value) if MEMORY.value else None
    ranked, plans, text = [], [], []
    for topology in pods.topologies(TOPOLOGY.value):
        asked = pods.Asked(cfg, topology, SLICES.value, STEP.value, cache, room, loads)
        if SEARCH.value:
            order = pods.searched(asked, SEARCH.value, say)
            ranked.append({"topology": topology.name, "candidates": [planned.of_candidate(c) for c in order]})
            text.append(f"{topology.name}\n{tables.of_search(order)}")
        else:
            chosen, source = pods.with_mesh(asked, MESH.value is not None)
            say(f"compiling the {STEP.value} step of {cfg.name} for {topology.name}")
            plans.append(pods.facts(chosen, source))
    text += [tables.of_plans(plans)] if plans else []
    return {"plans": plans, "search": ranked}, text


def parse_mesh(text: str) -> config.Mesh:
    """`fsdp=8,expert=64`."""
    sizes: dict[str, int] = {}
    for part in text.split(","):
        axis, _, size = part.strip().partition("=")
        if axis not in meshes.AXES or axis in sizes or not (size.isdecimal() and int(size)):
            raise ConfigError(
                f"--mesh={text}: {part!r} is not AXIS=SIZE with a size of at least 1 and an axis of {', '.join(meshes.AXES)}, each once"
            )
        sizes[axis] = int(size)
    return config.Mesh(**sizes)


def say(line: str) -> None:
    """Where people look while they wait."""
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    cli.run(main)
