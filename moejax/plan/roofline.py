"""How fast a step can be at best: the seconds that each resource of a chip needs for it, and the longest of them.

Nothing here is measured on a chip. What a compiled step says of itself (`plan.compiling`) is divided by peaks (`plan.hardware`). All
resources are taken to work at once and at their peak, so the largest time is a lower bound, and what follows from it an upper one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from moejax import config
from moejax import mesh as meshes
from moejax.errors import ConfigError, UserError
from moejax.layers import kinds
from moejax.plan import account, links, mixing, skew
from moejax.plan.account import Account
from moejax.plan.hardware import Topology
from moejax.plan.links import Wiring
from moejax.plan.skew import EVEN, Skew

NAMES = {"matrix": "matrix units", "memory": "HBM", "links": "links", "network": "data-centre network"}
PASSES = {"train": 3, "eval": 1, "prefill": 1, "decode": 1}
"""Forward passes that a step is worth in model FLOPs."""


class Seconds(NamedTuple):
    """What each resource needs for one step, alone and at its peak."""

    matrix: float
    memory: float
    links: float
    """Between chips of a slice."""
    network: float
    """Between slices."""

    @property
    def bound(self) -> str:
        """The resource that needs longest, a key of NAMES."""
        return max(NAMES, key=lambda name: getattr(self, name))

    @property
    def overlapped(self) -> float:
        """All of them at once: what a step takes at least."""
        return max(self)

    @property
    def serial(self) -> float:
        """One after the other."""
        return sum(self)


class Executed(NamedTuple):
    """FLOPs that the devices execute, as multiples of the model's. The parts are counted, `rest` is what they leave."""

    total: float
    masked: float
    """Scores of pairs that attention masks."""
    buffers: float
    """Places of capacity buffers beyond the requests, and the products that fill and empty them (transport einsum)."""
    rest: float
    """Recomputation, routers, embeddings by a product, padding."""


class Roofline(NamedTuple):
    """Bounds of one step."""

    seconds: Seconds
    model_flops: float
    """Of the step, all devices together."""
    flops_utilization: float
    """Upper bound of model FLOPs utilisation: model FLOPs over what the devices could do in the longest time."""
    tokens_per_second: float
    """Upper bound, of all devices."""
    executed: Executed

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        seconds = self.seconds._asdict() | {"overlapped": self.seconds.overlapped, "serial": self.seconds.serial}
        return self._asdict() | {"seconds": seconds, "bound": self.seconds.bound, "executed": self.executed._asdict()}


def of_compiled(
    compiled: Mapping[str, Any],
    cfg: config.Config,
    topology: Topology,
    slices: int = 1,
    step: str = "train",
    load: Skew = EVEN,
) -> Roofline:
    """Bounds of a compiled step on one slice or several.

    Args:
      compiled: what `plan.compiling.compiled` says of it.
      load: of experts as it was measured; compiled programs know only the even one.

    Raises UserError for a step that does not fit and so has no program, ConfigError for a mesh that the slices do not have.
    """
    if not compiled["fits"]:
        memory = compiled["memory"]
        raise UserError(
            f"the step needs {memory['used'] / 1e9:.1f} GB of {memory['room'] / 1e9:.1f} GB on a device, so there is no program to bound; "
            f"give it more devices, another mesh, model.remat=full or more train.microbatches"
        )
    wiring, chip, counted = wire(cfg, topology, slices), topology.chip, account.of_config(cfg)
    load = skew.felt(load, cfg.model.moe)
    sent = moved(compiled["collectives"], wiring, cfg, load)
    flops = compiled["flops"]["total"] + (load.slowest - 1) * expert_flops(counted, cfg, step) / compiled["devices"]
    seconds = Seconds(flops / chip.flops, traffic(compiled["memory"]) / chip.bandwidth, *sent)
    executed = float(compiled["flops"]["total"] * compiled["devices"])
    return bounds(seconds, cfg, topology, slices, step, counted, executed)


def bounds(
    seconds: Seconds, cfg: config.Config, topology: Topology, slices: int, step: str, counted: Account, executed: float
) -> Roofline:
    """What follows from the seconds of each resource; `executed` are FLOPs of all devices."""
    useful, devices = model_flops(counted, cfg, step), topology.devices * slices
    return Roofline(
        seconds=seconds,
        model_flops=useful,
        flops_utilization=useful / (devices * seconds.overlapped * topology.chip.flops),
        tokens_per_second=tokens(cfg, step) / seconds.overlapped,
        executed=_executed(executed / useful, useful, cfg, step, counted),
    )


def wire(cfg: config.Config, topology: Topology, slices: int) -> Wiring:
    """The config's mesh on the links. Raises ConfigError where the slice's dimensions do not make it."""
    sizes = dict(zip(meshes.AXES, meshes.shape(cfg.mesh), strict=True))
    found = links.lay(topology, sizes, slices)
    if found is None:
        raise ConfigError(
            f"mesh {sizes} on {topology.name}: every axis must be the product of whole dimensions of {topology.grid}; choose such sizes"
        )
    return found


def traffic(memory: Mapping[str, int]) -> float:
    """Bytes that a step moves to and from main memory at least: arguments read once, results written once, what is donated too, and
    every byte of temporaries written and read once. Programs read weights and temporaries more often."""
    return float(memory["arguments"] + memory["outputs"] + memory.get("donated", 0) + 2 * memory["temporaries"])


def moved(rows: Iterable[Mapping[str, Any]], wiring: Wiring, cfg: config.Config, load: Skew) -> tuple[float, float]:
    """Seconds on links and on the network. A ragged exchange sends the rows in its buffer alone, and takes as long as the device that
    gets most of them; any other takes further rounds."""
    rounds = {"ragged-all-to-all": load.slowest / cfg.model.moe.receive_buffer, "all-to-all": load.rounds}
    within = between = 0.0
    for row in rows:
        uneven = rounds.get(row["kind"], 1.0)
        inside, across = links.seconds(row, wiring)
        within, between = within + uneven * inside, between + uneven * across
    return within, between


def tokens(cfg: config.Config, step: str) -> int:
    """That one step reads."""
    return cfg.data.batch * (1 if step == "decode" else cfg.data.context)


def model_flops(counted: Account, cfg: config.Config, step: str) -> float:
    """Of one step, all devices together: three forward passes in training, one token at the last position in decoding."""
    if step == "decode":
        return float(tokens(cfg, step) * account.decoding_flops(counted, cfg.data.context))
    return PASSES[step] * tokens(cfg, step) * account.model_flops(counted, cfg.data.context)


def expert_flops(counted: Account, cfg: config.Config, step: str) -> float:
    """Of `model_flops`, those of routed experts."""
    weights = sum(part.multiplied for part in counted.parts if part.name == "experts")
    return 2.0 * PASSES[step] * tokens(cfg, step) * weights


def masked_flops(counted: Account, cfg: config.Config, step: str) -> float:
    """Of scores that are computed and masked: a step computes all pairs of a row, decoding those with all places of the cache."""
    rows, context = cfg.data.batch, cfg.data.context
    if step == "decode":
        hidden = [m.layers * m.pair * (context - mixing.seen(m, context)) for m in counted.mixings if m.decoding]
    else:
        hidden = [m.layers * m.pair * (context * context - mixing.pairs(m, context)) for m in counted.mixings]
    return float(PASSES[step] * rows * sum(hidden))


def buffer_flops(counted: Account, cfg: config.Config, step: str) -> float:
    """Of places in capacity buffers that no request fills, all experts taken equally often, and of one-hot dispatch and combine."""
    moe = cfg.model.moe
    if (
        moe.capacity_factor is None
        or moe.transport not in ("einsum", "scatter")
        or not kinds.number(cfg.model, "sparse")
    ):
        return 0.0
    empty = max(moe.capacity_factor - 1, 0.0) * expert_flops(counted, cfg, step)
    if moe.transport == "scatter":
        return empty
    group = moe.group_window or moe.group_rows * cfg.data.context
    places = math.ceil(moe.capacity_factor * moe.top_k * group / moe.num_experts) * moe.num_experts
    layers = kinds.number(cfg.model, "sparse")
    return empty + 2 * PASSES[step] * layers * tokens(cfg, step) * 2.0 * places * (moe.latent or cfg.model.width)


def _executed(total: float, useful: float, cfg: config.Config, step: str, counted: Account) -> Executed:
    masked = masked_flops(counted, cfg, step) / useful
    buffers = buffer_flops(counted, cfg, step) / useful
    return Executed(total, masked, buffers, total - 1 - masked - buffers)
