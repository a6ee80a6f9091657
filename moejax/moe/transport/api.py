"""What a transport is: a few functions behind one name, called inside shard_map on one shard's groups.

route(assignment, plan) -> Route          permutation, counts and offsets; serves several arrays
dispatch(route, x [G,S,D]) -> rows        tokens to the devices that own their experts
experts(route, rows, weights, impl, activation) -> rows
combine(route, rows) -> y [G,S,D]         sum of gate * row, back in token order, fp32
regate(route, gate [G,A]) -> Route        the same places with other gates
sums(route) -> Stats                      what the exchange took, in integers; it depends on the mesh (TRAFFIC)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from moejax.arrays import Stats


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
