"""Transports: how tokens reach their experts and come back. Same Assignment, same answer, on every mesh.

Each is a few functions behind one name, called inside shard_map on one shard's groups:

    route(assignment, plan) -> Route          permutation, counts and offsets; serves several arrays
    dispatch(route, x [G,S,D]) -> rows        tokens to the devices that own their experts
    experts(route, rows, weights, impl, clamp) -> rows
    combine(route, rows) -> y [G,S,D]         sum of gate * row, back in token order, fp32
    regate(route, gate [G,A]) -> Route        the same places with other gates
    sums(route) -> Stats                      what the exchange took, in integers; it depends on the mesh (TRAFFIC)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from moejax import collectives, config
from moejax.arrays import Stats
from moejax.collectives import Axes
from moejax.errors import ConfigError
from moejax.moe.routers.api import Router
from moejax.moe.transport import einsum, exchange, gather, ragged, scatter, soft


@dataclasses.dataclass(frozen=True)
class Transport:
    route: Callable[..., Any]
    dispatch: Callable[..., Any]
    experts: Callable[..., Any]
    combine: Callable[..., Any]
    regate: Callable[..., Any]
    sums: Callable[[Any], Stats]
    dropless: bool
    """Its memory does not grow with the capacity, so it can do without one."""


TRAFFIC = frozenset({"rows_sent", "rounds", "exchanges"})
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

    def combine(route: Any, rows: Any) -> Any:
        return collectives.total(chosen.combine(route, rows), width)

    return dataclasses.replace(chosen, combine=combine)
