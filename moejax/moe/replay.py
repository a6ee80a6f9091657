"""Routing recorded and played back: recorded integers, recomputed gates, differences counted."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moejax.arrays import NOWHERE, Stats
from moejax.moe.records import Routed


class Recorded(NamedTuple):
    """A layer's routing: the integers of `Routed` that decide anything, which are played back, and how near each token was to
    another choice, which is not."""

    token: Int[Array, "*L G A"]
    expert: Int[Array, "*L G A"]
    original: Int[Array, "*L G A"]
    asked: Bool[Array, "*L G A"]
    slot: Int[Array, "*L G A"]
    excess: Int[Array, "*L G S"]
    margin: Float[Array, "*L G S"]


def record(routed: Routed) -> Recorded:
    return Recorded(
        routed.token, routed.expert, routed.original, routed.asked, routed.slot, routed.excess, routed.margin
    )


def play(recorded: Recorded, routed: Routed) -> tuple[Routed, Stats]:
    """The recorded decisions in place of the router's own, and how many requests those would have decided otherwise.

    A request differs when its token, expert or fate (kept or not) does; slots move with any earlier difference and are not
    counted again.
    """
    own, old = record(routed), recorded
    same = (own.token == old.token) & (own.expert == old.expert) & ((own.slot == NOWHERE) == (old.slot == NOWHERE))
    differs = (own.asked | old.asked) & ~(same & (own.asked == old.asked))
    decided = {name: value for name, value in old._asdict().items() if name != "margin"}
    return routed._replace(**decided), {"mismatched": jnp.sum(differs, dtype=jnp.int32)}
