"""One step on one topology: what it takes, whether it fits, what bounds it. From the compiler, with the analytic side beside it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from moejax import config
from moejax import mesh as meshes
from moejax.errors import ConfigError
from moejax.layers import kinds
from moejax.plan import aot, exchange, hardware, memory, roofline, search, skew, temporaries
from moejax.plan.hardware import Topology
from moejax.train import check


@dataclasses.dataclass(frozen=True)
class Asked:
    """What a plan is made of."""

    config: config.Config
    topology: Topology
    slices: int = 1
    step: str = "train"
    cache: Path | None = None
    """Folder of answers that were had before; None asks the compiler."""
    memory: int | None = None
    """Bytes of this machine that the compiler may take; None is what is free."""
    loads: np.ndarray | None = None
    """Measured requests [layers, E]; None is the even load."""

    def load(self, cfg: config.Config) -> skew.Skew:
        """How evenly experts are taken on the mesh of this config."""
        return skew.EVEN if self.loads is None else skew.skew(self.loads, cfg)


def with_mesh(asked: Asked, given: bool) -> tuple[Asked, str]:
    """The request with a mesh that has as many devices as the slices, and where the mesh is from: the one that was given, or the best by
    the estimate. Raises ConfigError for a given one of another number."""
    number = asked.topology.devices * asked.slices
    own = int(np.prod(meshes.shape(asked.config.mesh)))
    if given or (own == number and own > 1):
        if own != number:
            sizes = ",".join(f"{axis}={n}" for axis, n in meshes.several(asked.config.mesh).items())
            raise ConfigError(
                f"mesh {sizes or 'of one device'} has {own} devices, and {asked.slices} slice(s) of {asked.topology.name} have {number}; "
                f"the product of --mesh must be {number}; without --mesh one is chosen"
            )
        check.check(asked.config)
        roofline.wire(asked.config, asked.topology, asked.slices)
        return asked, "given"
    best = search.search(asked.config, asked.topology, asked.slices, keep=1, load=asked.load)[0]
    return dataclasses.replace(asked, config=best.config), "the best by the estimate"


def compiled(asked: Asked) -> dict[str, Any]:
    """What the compiler says. Raises ConfigError for what it refuses."""
    request = aot.Request(asked.config, asked.topology.name, asked.slices, asked.step)
    return aot.compiled(request, asked.cache, asked.memory)


def facts(asked: Asked, chosen: str = "given") -> dict[str, Any]:
    """Everything that is known of one step, for JSON; `fits` and where it does not `reason`."""
    made = compiled(asked)
    cfg, topology = asked.config, asked.topology
    arguments, load = memory.arguments(cfg, asked.step), asked.load(cfg)
    found: dict[str, Any] = {
        "topology": topology.name, "slices": asked.slices, "chips": topology.chips * asked.slices, "step": asked.step,
        "mesh": meshes.several(cfg.mesh), "mesh_from": chosen,
        "batch": cfg.data.batch, "context": cfg.data.context, "microbatches": cfg.train.microbatches,
        "room": topology.chip.usable, "arguments_by_kind": arguments, "load": load._asdict(),
    }  # fmt: skip
    if asked.step == "train":
        found["estimated_temporaries"] = temporaries.estimate(cfg).total
    found |= made
    used = made["memory"]["used"]
    found["margin"] = 1 - used / topology.chip.usable
    if not made["fits"]:
        return found | {"reason": search.misfit(arguments, used, topology.chip.usable)}
    found["roofline"] = roofline.of_compiled(made, cfg, topology, asked.slices, asked.step, load).to_dict()
    sparse = kinds.number(cfg.model, "sparse")
    carried = exchange.compare(cfg, topology, asked.slices, asked.step, load) if sparse else []
    found["transports"] = [c._asdict() for c in carried]
    return found


def searched(asked: Asked, compile_best: int, say: Callable[[str], None]) -> list[search.Candidate]:
    """Meshes for a training step, the best first: those that were compiled, `compile_best` of the best by the estimate; the others by
    the estimate; what does not fit."""
    every = search.search(asked.config, asked.topology, asked.slices, load=asked.load)
    fitting = [c for c in every if c.fits][:compile_best]

    def ask(candidate: search.Candidate) -> dict[str, Any]:
        say(f"compiling {search_line(candidate)}")
        return compiled(dataclasses.replace(asked, config=candidate.config))

    order = [*search.refine(fitting, ask, asked.load), *(c for c in every if c not in fitting)]
    return sorted(order, key=lambda candidate: not candidate.fits)


def search_line(candidate: search.Candidate) -> str:
    """`fsdp=8 expert=64`."""
    return " ".join(f"{axis}={n}" for axis, n in meshes.several(candidate.config.mesh).items()) or "one device"


def topologies(names: list[str]) -> list[Topology]:
    """Of their names. Raises ConfigError for one that nothing is known of, or that no compiler is for."""
    found = [hardware.parse_topology(name) for name in names]
    for topology in found:
        if not topology.chip.torus:
            raise ConfigError(
                f"--topology={topology.name}: programs are compiled for TPU; choose a chip from {', '.join(_tpus())}"
            )
    return found


def _tpus() -> list[str]:
    return [name for name, chip in hardware.CHIPS.items() if chip.torus]
