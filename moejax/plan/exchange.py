"""What each transport sends for a sparse layer, counted from shapes, and which is cheapest on a slice.

Rows of collectives are like those of a compiled program (`plan.sends.summed`), so that both are timed alike.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from typing import Any, NamedTuple

import jax.numpy as jnp

from moejax import config, sharding
from moejax.errors import ConfigError
from moejax.moe import assignment, experts, widths
from moejax.moe.routers import ROUTERS
from moejax.moe.transport import DROPLESS, TRANSPORTS, ragged
from moejax.moe.transport.exchange import BY_PLATFORM
from moejax.plan import memory, roofline, skew
from moejax.plan.hardware import Topology
from moejax.plan.skew import EVEN, Skew
from moejax.train import check

Row = dict[str, Any]
BACKWARD = {"none": 2, "exchanged": 2, "selective": 4, "full": 4}
"""Crossings of a layer's rows in the backward pass, by model.remat: docs/shapes.md, counted in programs compiled for TPU. Forward: 2."""
REGATHERED = ("selective", "full")
"""Policies under which the backward pass gathers again what the forward pass gathered."""


class Carried(NamedTuple):
    """What one transport costs a device in one sparse layer and microbatch, beyond the experts' own products."""

    transport: str
    sent: float
    """Bytes on links and network."""
    moved: float
    """Bytes of buffers to and from main memory."""
    flops: float
    """Of places that nobody took, and of one-hot dispatch and combine."""
    seconds: float
    """All of it, one after another, at peak."""


def row(kind: str, axes: tuple[str, ...], cfg: config.Config, size: float | int, times: int = 1) -> Row:
    """A collective whose larger side is `size` bytes on a device, `times` times. Axes of one device are left out."""
    axes = tuple(axis for axis in axes if getattr(cfg.mesh, axis) > 1)
    devices = memory.devices(cfg.mesh, axes)
    wire = (2 if kind == "all-reduce" else 1) * (devices - 1) / devices * size * times
    return {"kind": kind, "axes": list(axes), "devices": devices, "times": times, "bytes": size * times, "wire": wire}


def compare(
    cfg: config.Config, topology: Topology, slices: int = 1, step: str = "train", load: Skew = EVEN
) -> list[Carried]:
    """Every transport that the config's check allows, the cheapest first. Other options of the config stay. Raises ConfigError where the
    config is not allowed for another reason."""
    found = []
    for name in TRANSPORTS:
        with contextlib.suppress(ConfigError):
            own = using(cfg, name)
            check.check(own)
            if of_step(own, step).model.moe.transport == name:
                found.append(_carried(own, topology, slices, step, load))
    if not found:
        check.check(cfg)
    return sorted(found, key=lambda carried: carried.seconds)


def using(cfg: config.Config, name: str) -> config.Config:
    """The config with another transport; options that it does not read at their defaults."""
    changes: dict[str, Any] = {"transport": name}
    if name != "ragged":
        changes |= {option: getattr(config.MoE, option) for option in ("receive_buffer", "exchange")}
    moe = dataclasses.replace(cfg.model.moe, **changes)
    return dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, moe=moe))


def of_step(cfg: config.Config, step: str) -> config.Config:
    """The config with the transport of a step: where nothing bounds a forward pass it is dropless (moejax.moe.transport.of)."""
    moe = cfg.model.moe
    bounded = step == "train" or ROUTERS[moe.router].bounded or ROUTERS[moe.router].soft
    return cfg if bounded or TRANSPORTS[moe.transport].dropless else using(cfg, DROPLESS)


def forward_passes(cfg: config.Config, step: str) -> int:
    """Of every microbatch: with several, one counts sums of the whole batch before one is differentiated (moejax/train/step.py)."""
    return 1 + (step == "train" and cfg.train.microbatches > 1)


def local_tokens(cfg: config.Config, step: str) -> float:
    """Tokens that a device routes in one microbatch, with those of rows that pad the batch."""
    parts = memory.devices(cfg.mesh, sharding.axes(sharding.LAYOUTS[cfg.model.moe.tensor].shard))
    read = cfg.data.batch if step == "decode" else memory.rows(cfg) * cfg.data.context
    return read / parts / (cfg.train.microbatches if step == "train" else 1)


def buffer_bytes(cfg: config.Config, step: str) -> float:
    """Of the largest array of rows that a device sends, or of all tokens that it gathers."""
    moe, wide = cfg.model.moe, row_bytes(cfg)
    here = local_tokens(cfg, step)
    if moe.transport in ("einsum", "scatter"):
        return here * _places(cfg) * wide
    if moe.transport == "gather":
        return here * skew.shards(cfg) * wide
    shards = skew.shards(cfg)
    return float(shards * ragged.slots(moe.receive_buffer, shards, math.ceil(here * moe.top_k)) * wide)


def of_layer(cfg: config.Config, step: str) -> list[Row]:
    """Collectives of one sparse layer's rows in one microbatch; empty where experts lie on one device."""
    cfg = of_step(cfg, step)
    moe, size, train = cfg.model.moe, buffer_bytes(cfg, step), step == "train"
    layout = sharding.LAYOUTS[moe.tensor]
    axes = sharding.axes(layout.expert)
    if skew.shards(cfg) == 1:
        return []
    if moe.transport == "gather":
        wide = size * 4 / jnp.dtype(cfg.model.compute_dtype).itemsize  # sums go home in fp32
        again = int(train and cfg.model.remat in REGATHERED)
        passes = forward_passes(cfg, step)
        gathers = [row("all-gather", axes, cfg, size, passes + again), row("reduce-scatter", axes, cfg, wide, passes)]
        return gathers + ([row("reduce-scatter", axes, cfg, size), row("all-gather", axes, cfg, wide)] if train else [])
    times = 2 * forward_passes(cfg, step) + (BACKWARD[cfg.model.remat] if train else 0)
    native = moe.transport == "ragged" and (BY_PLATFORM["tpu"] if moe.exchange == "auto" else moe.exchange) == "native"
    found = [row("ragged-all-to-all" if native else "all-to-all", axes, cfg, size, times)]
    pieces = memory.devices(cfg.mesh, sharding.axes(layout.position))
    if moe.transport != "ragged" and pieces > 1 and moe.group_window is None:
        cut = sharding.axes(layout.position)
        found += [row(kind, cut, cfg, size * pieces, times // 2) for kind in ("reduce-scatter", "all-gather")]
    return found


def _carried(cfg: config.Config, topology: Topology, slices: int, step: str, load: Skew) -> Carried:
    moe, chip, load = cfg.model.moe, topology.chip, skew.felt(load, cfg.model.moe)
    rows = of_layer(cfg, step)
    links = sum(roofline.moved(rows, roofline.wire(cfg, topology, slices), cfg, load))
    # Each crossing writes and reads what is sent and what arrives.
    moved = sum(4.0 * r["bytes"] for r in rows) or 4.0 * buffer_bytes(cfg, step)
    flops = _flops(cfg, step)
    return Carried(
        moe.transport, sum(r["wire"] for r in rows), moved, flops, links + moved / chip.bandwidth + flops / chip.flops
    )


def _flops(cfg: config.Config, step: str) -> float:
    moe, here = cfg.model.moe, local_tokens(cfg, step)
    if moe.transport not in ("einsum", "scatter"):
        return 0.0
    products = 3 if experts.activation_of(moe).gated else 2
    width, hidden = row_bytes(cfg) / jnp.dtype(cfg.model.compute_dtype).itemsize, widths.of_classes(moe)
    empty = max(_places(cfg) - moe.top_k, 0) * 2 * products * width * sum(hidden) / len(hidden)
    group = moe.group_window or moe.group_rows * cfg.data.context
    masks = 2 * 2 * _places(cfg) * group * width if moe.transport == "einsum" else 0.0
    return roofline.PASSES[step] * here * (empty + masks)


def _places(cfg: config.Config) -> float:
    """Places in capacity buffers for each token."""
    moe = cfg.model.moe
    group = moe.group_window or moe.group_rows * cfg.data.context
    slots = assignment.capacity(moe.capacity_factor, moe.top_k, moe.num_experts, group)
    return moe.num_experts * int(slots) / group


def row_bytes(cfg: config.Config) -> int:
    """Of one token's vector as it is sent."""
    return (cfg.model.moe.latent or cfg.model.width) * jnp.dtype(cfg.model.compute_dtype).itemsize
