"""Every way to lay a mesh on a slice, sorted by an estimate of its step; then by the compiler for the few that are worth it."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from moejax import config, sharding
from moejax import mesh as meshes
from moejax.errors import ConfigError
from moejax.plan import account, links, memory, roofline, skew, temporaries, traffic
from moejax.plan.account import Account
from moejax.plan.hardware import Topology
from moejax.plan.links import Wiring
from moejax.plan.roofline import NAMES, Roofline, Seconds
from moejax.plan.skew import EVEN, Skew
from moejax.train import check


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One mesh for one config."""

    config: config.Config
    """With this mesh."""
    topology: Topology
    slices: int
    fits: bool
    """As far as is known: where it was not compiled, the estimate less its margin is below what a device has."""
    memory: dict[str, int]
    """Bytes of one device by kind."""
    roofline: Roofline
    reason: str
    """Why it stands where it stands, in words."""
    compiled: bool = False

    @property
    def used(self) -> int:
        return sum(self.memory.values())

    @property
    def rank(self) -> tuple[bool, float]:
        """Those that fit first; they by the time of a step, its parts one after another, as nothing says what the compiler hides."""
        return not self.fits, self.roofline.seconds.serial if self.fits else float(self.used)


Load = Callable[[config.Config], Skew]
"""How evenly experts are taken on a config's mesh."""


def even(cfg: config.Config) -> Skew:
    """On every mesh."""
    return EVEN


def search(
    cfg: config.Config,
    topology: Topology,
    slices: int = 1,
    keep: int | None = None,
    load: Load = even,
    spare: float = 0.0,
) -> list[Candidate]:
    """Meshes for a training step that the config's check accepts and the slice has, the best first; those that do not fit come last. Each
    has the fewest microbatches that leave the share `spare` of a device's memory free by the estimate.

    Raises ConfigError where there is none, with what the check said of the config's own mesh."""
    counted = account.of_config(cfg)
    found = [_candidate(own, wiring, counted, load(own)) for own, wiring in _allowed(cfg, topology, slices, spare)]
    if not found:
        check.check(cfg)
        raise ConfigError(
            f"no mesh of {topology.devices * slices} devices on {slices} slice(s) of {topology.name} is allowed for this config; choose "
            f"another slice, or numbers of experts, heads and widths with more common factors"
        )
    return sorted(found, key=lambda candidate: candidate.rank)[:keep]


def refine(
    candidates: Iterable[Candidate], compile: Callable[[Candidate], Mapping[str, Any]], load: Load = even
) -> list[Candidate]:
    """The same, with memory and seconds of compiled steps, the best first; what the compiler refuses comes last.

    Args:
      compile: what `plan.compiling.compiled` says of a candidate's training step; a ConfigError is the compiler's refusal.
    """
    refined = (_refined(candidate, compile, load(candidate.config)) for candidate in candidates)
    return sorted(refined, key=lambda candidate: candidate.rank)


def sizes(number: int, axes: int) -> Iterator[tuple[int, ...]]:
    """All ways to write a number as a product of so many ordered factors."""
    if axes == 1:
        yield (number,)
        return
    for first in range(1, number + 1):
        if number % first == 0:
            yield from ((first, *rest) for rest in sizes(number // first, axes - 1))


def _allowed(
    cfg: config.Config, topology: Topology, slices: int, spare: float
) -> Iterator[tuple[config.Config, Wiring]]:
    """Configs with every mesh that lies on the slices and passes the check."""
    for inside in sizes(topology.devices, len(meshes.AXES)):
        shape = dict(zip(meshes.AXES, inside, strict=True))
        shape[meshes.ACROSS] *= slices
        wiring = links.lay(topology, shape, slices)
        if wiring is None:
            continue
        own = dataclasses.replace(cfg, mesh=config.Mesh(**shape))
        with contextlib.suppress(ConfigError):
            check.check(own)
            yield in_parts(own, (1 - spare) * topology.chip.usable), wiring


def in_parts(cfg: config.Config, room: float) -> config.Config:
    """The config with the fewest microbatches, its own number or a multiple, that fit by the estimate; the most there can be where none
    does. A microbatch has a row for every batch shard at least."""
    shards = math.prod(getattr(cfg.mesh, axis) for axis in sharding.axes("batch"))
    most = cfg.data.batch // (shards * cfg.model.moe.group_rows * cfg.train.microbatches)
    best, given = cfg, sum(memory.arguments(cfg).values())
    for parts in (n for n in range(1, most + 1) if most % n == 0):
        train = dataclasses.replace(cfg.train, microbatches=parts * cfg.train.microbatches)
        best = dataclasses.replace(cfg, train=train)
        if given + temporaries.estimate(best).total <= room:
            break
    return best


def _candidate(cfg: config.Config, wiring: Wiring, counted: Account, load: Skew) -> Candidate:
    topology, slices, chip = wiring.topology, wiring.slices, wiring.topology.chip
    load = skew.felt(load, cfg.model.moe)
    given, made = memory.arguments(cfg), temporaries.estimate(cfg)
    needed = given | made._asdict()
    least = sum(needed.values()) - temporaries.MARGIN * made.total
    flops = traffic.executed_flops(counted, cfg)
    uneven = (load.slowest - 1) * roofline.expert_flops(counted, cfg, "train")
    sent = roofline.moved(traffic.rows(cfg), wiring, cfg, load)
    devices = topology.devices * slices
    moved = traffic.moved_bytes(cfg, sum(given.values()), made.gradients, made.saved)
    seconds = Seconds((flops + uneven) / devices / chip.flops, moved / chip.bandwidth, *sent)
    bounds = roofline.bounds(seconds, cfg, topology, slices, "train", counted, flops)
    fits = least <= chip.usable
    return Candidate(cfg, topology, slices, fits, needed, bounds, _reason(fits, needed, chip.usable, seconds))


def _refined(candidate: Candidate, compile: Callable[[Candidate], Mapping[str, Any]], load: Skew) -> Candidate:
    room = candidate.topology.chip.usable
    try:
        made = compile(candidate)
    except ConfigError as error:
        return dataclasses.replace(candidate, fits=False, compiled=True, reason=f"refused: {error}")
    if not made["fits"]:
        used = {"used": made["memory"]["used"]}
        reason = _reason(
            False, candidate.memory, made["memory"].get("room", room), candidate.roofline.seconds, used["used"]
        )
        return dataclasses.replace(candidate, fits=False, compiled=True, memory=used, reason=reason)
    needed = {name: made["memory"][name] for name in ("arguments", "outputs", "temporaries", "code")}
    bounds = roofline.of_compiled(made, candidate.config, candidate.topology, candidate.slices, load=load)
    reason = _reason(True, needed, room, bounds.seconds)
    return dataclasses.replace(candidate, fits=True, compiled=True, memory=needed, roofline=bounds, reason=reason)


def _reason(fits: bool, needed: Mapping[str, int], room: int, seconds: Seconds, used: int | None = None) -> str:
    """`does not fit: 96.1 of 95.7 GB, optimizer 41 %`, or `links: 1.3 s of 2.0 s`."""
    if not fits:
        return misfit(needed, used or sum(needed.values()), room)
    longest = getattr(seconds, seconds.bound)
    return f"{NAMES[seconds.bound]}: {_time(longest)} of {_time(seconds.serial)}"


def misfit(needed: Mapping[str, int], used: int, room: int) -> str:
    """What is used of what there is, and the largest part of what was counted."""
    most, total = max(needed, key=lambda name: needed[name]), sum(needed.values())
    return f"does not fit: {used / 1e9:.1f} of {room / 1e9:.1f} GB, {most} {needed[most] / total:.0%}"


def _time(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 0.1 or math.isinf(seconds) else f"{seconds * 1e3:.3g} ms"
