"""Transports: how tokens reach their experts and come back. Same Assignment, same answer, on every mesh. See api.py."""

from __future__ import annotations

import dataclasses
from typing import Any

from moejax import collectives, config
from moejax.arrays import Stats
from moejax.collectives import Axes
from moejax.errors import ConfigError
from moejax.moe.routers.api import Router
from moejax.moe.transport import einsum, exchange, gather, ragged, scatter, soft
from moejax.moe.transport.api import Transport
from moejax.moe.transport.chunks import chunked

TRAFFIC = frozenset({"rows_sent", "rounds", "exchanges", "visits"})
"""Sums that depend on the mesh."""


def _nothing(route: Any) -> Stats:
    return {}


def _of(module: Any, dropless: bool) -> Transport:
    sums = getattr(module, "sums", _nothing)
    return Transport(module.route, module.dispatch, module.experts, module.combine, module.regate, sums, dropless)


TRANSPORTS: dict[str, Transport] = {
    "einsum": _of(einsum, dropless=False),
    "scatter": _of(scatter, dropless=False),
    "gather": _of(gather, dropless=True),
    "ragged": _of(ragged, dropless=True),
}

SOFT = _of(soft, dropless=True)
"""Of a SoftAssignment: the einsum with weights in place of zeros and ones."""

DROPLESS = "gather"
"""The transport of dropless evaluation when training has a capacity."""


def check(moe: config.MoE, kind: Router) -> None:
    """The transport exists and suits the capacity and the router."""
    if moe.transport not in TRANSPORTS:
        raise ConfigError(
            f"model.moe.transport={moe.transport!r} is not a transport; choose one of {', '.join(TRANSPORTS)}"
        )
    if not moe.receive_buffer > 0:
        raise ConfigError(
            f"model.moe.receive_buffer={moe.receive_buffer}: a multiple of the fair share, above 0; set 1.25"
        )
    if moe.chunks < 1:
        raise ConfigError(f"model.moe.chunks={moe.chunks}: a number of exchanges, at least 1")
    exchange.check(moe)
    for name in ("receive_buffer", "exchange"):
        default = getattr(config.MoE, name)
        if getattr(moe, name) != default and moe.transport != "ragged":
            raise ConfigError(
                f"model.moe.{name}={getattr(moe, name)} is not read by transport={moe.transport}; set "
                f"model.moe.transport=ragged or {name}={default}"
            )
    if kind.soft and moe.transport != "einsum":
        raise ConfigError(
            f"model.moe.transport={moe.transport} with router={moe.router}, whose slots mix all tokens of a group; set "
            f"model.moe.transport=einsum"
        )
    if not kind.soft and moe.capacity_factor is None and not TRANSPORTS[moe.transport].dropless:
        raise ConfigError(
            f"model.moe.transport={moe.transport} has buffers of a capacity and model.moe.capacity_factor is null; "
            f"set model.moe.capacity_factor=1.25 or model.moe.transport={DROPLESS}"
        )


def of(moe: config.MoE, kind: Router, factor: float | None, width: Axes = ()) -> Transport:
    """The config's transport, the dropless one where there is no capacity, or that of soft assignments.

    Along the mesh axes `width` every expert is cut, so that what comes home is partial: it is summed by token."""
    chosen = SOFT if kind.soft else TRANSPORTS[moe.transport]
    chosen = chosen if factor is not None or chosen.dropless else TRANSPORTS[DROPLESS]

    chosen = chosen if moe.chunks == 1 else chunked(chosen, moe.chunks)

    def combine(route: Any, rows: Any) -> Any:
        return collectives.total(chosen.combine(route, rows), width)

    return dataclasses.replace(chosen, combine=combine)
