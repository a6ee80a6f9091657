"""What measured loads of experts do to a mesh: the slowest device, further rounds of an exchange, requests that find no place.

Loads are those of a run's routing/STEP.npz, `sparse.requests` [layers, E]: how many requests each expert got of a step's batch, before
any was dropped or went elsewhere.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from moejax import config, sharding
from moejax.errors import DamagedError, UserError
from moejax.moe import widths
from moejax.moe.transport import TRANSPORTS


class Skew(NamedTuple):
    """Of all sparse layers. Every number is at least what it is when all experts are taken equally often."""

    slowest: float
    """Rows of the slowest device as a multiple of the mean, averaged over layers: what the time of experts is multiplied by."""
    worst: float
    """The same of the worst layer."""
    hottest: float
    """Rows of the hottest expert as a multiple of the mean, of the worst layer."""
    rounds: float
    """Rounds of an exchange, averaged over layers; 1 where everything fits, and where the transport has no rounds."""
    dropped: float
    """Share of requests that find no place at the capacity factor; 0 without one."""


EVEN = Skew(1.0, 1.0, 1.0, 1.0, 0.0)
"""All experts taken equally often."""


def skew(loads: Int[np.ndarray, "layers E"], cfg: config.Config) -> Skew:
    """Of measured loads on the config's mesh, its experts in contiguous blocks over the axes that they lie along.

    Every group and every device is taken to ask as the whole batch does, so rounds and drops are the least there can be. Raises UserError
    for loads of another number of experts, or of none.
    """
    moe = cfg.model.moe
    routed = np.asarray(loads, np.float64)[:, : moe.num_experts]  # zero-computation experts have the ids after
    if routed.shape[1] != moe.num_experts or not (routed.sum(axis=1) > 0).all():
        raise UserError(
            f"loads of shape {np.shape(loads)} for model.moe.num_experts={moe.num_experts}: give a row for each sparse layer with a count "
            f"for each expert, of a step in which every layer routed something"
        )
    share = routed / routed.sum(axis=1, keepdims=True)
    devices = shards(cfg)
    parts = share.reshape(len(share), len(widths.of_classes(moe)), devices, -1).sum(axis=(1, 3))
    uneven = devices * parts.max(axis=1)
    return Skew(
        slowest=float(uneven.mean()),
        worst=float(uneven.max()),
        hottest=float(moe.num_experts * share.max()),
        rounds=_rounds(uneven, moe),
        dropped=_dropped(share, moe),
    )


def felt(load: Skew, moe: config.MoE) -> Skew:
    """What of uneven loads changes the time of a step: nothing where buffers of a capacity are computed whole."""
    return load if TRANSPORTS[moe.transport].dropless else EVEN


def shards(cfg: config.Config) -> int:
    """Devices that the experts of a layer are cut over."""
    return math.prod(getattr(cfg.mesh, axis) for axis in sharding.axes(sharding.LAYOUTS[cfg.model.moe.tensor].expert))


def read(file: Path) -> Int[np.ndarray, "layers E"]:
    """The loads in a file of routing/ of a run. Raises UserError where it has none, DamagedError where it cannot be read."""
    try:
        with np.load(file) as arrays:
            found = [arrays[key] for key in arrays.files if key.rpartition(".")[2] == "requests"]
    except Exception as error:  # zipfile, zlib and NumPy each have their own
        raise DamagedError(f"{file} cannot be read ({error}); give routing/STEP.npz of a run") from error
    if not found:
        raise UserError(f"{file} has no loads of experts; give routing/STEP.npz of a run with a sparse layer")
    return np.concatenate(found).astype(np.int64)


def _rounds(uneven: Float[np.ndarray, " layers"], moe: config.MoE) -> float:
    """A round moves `receive_buffer` fair shares to every device."""
    if moe.transport != "ragged":
        return 1.0
    return float(np.maximum(np.ceil(uneven / moe.receive_buffer - 1e-9), 1).mean())


def _dropped(share: Float[np.ndarray, "layers E"], moe: config.MoE) -> float:
    """What an expert is asked for beyond its places."""
    if moe.capacity_factor is None:
        return 0.0
    return float(np.maximum(share - moe.capacity_factor / moe.num_experts, 0).sum(axis=1).mean())
