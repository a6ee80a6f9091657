"""Routing recorded and played back: recorded integers, recomputed gates, differences counted."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from moejax.arrays import NOWHERE, Stats
from moejax.moe.records import Routed


class Recorded(NamedTuple):
    """The integers of a layer's routing: what of `Routed` decides anything."""

    token: Int[Array, "*L G A"]
    expert: Int[Array, "*L G A"]
    original: Int[Array, "*L G A"]
    asked: Bool[Array, "*L G A"]
    slot: Int[Array, "*L G A"]
    excess: Int[Array, "*L G S"]


def record(routed: Routed) -> Recorded:
    return Recorded(routed.token, routed.expert, routed.original, routed.asked, routed.slot, routed.excess)


def play(recorded: Recorded, routed: Routed) -> tuple[Routed, Stats]:
    """The recorded decisions in place of the router's own, and how many requests those would have decided otherwise.

    A request differs when its token, expert or fate (kept or not) does; slots move with any earlier difference and are not
    counted again.
    """
    own, old = record(routed), recorded
    same = (own.token == old.token) & (own.expert == old.expert) & ((own.slot == NOWHERE) == (old.slot == NOWHERE))
    differs = (own.asked | old.asked) & ~(same & (own.asked == old.asked))
    return routed._replace(**old._asdict()), {"mismatched": jnp.sum(differs, dtype=jnp.int32)}
