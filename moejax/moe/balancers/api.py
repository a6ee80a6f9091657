"""What a balancer is: of a loss on sums, a bias on selection, a mix of scores and a state, each fills what it needs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from moejax import config
from moejax.arrays import Assignment, SoftAssignment, Stats
from moejax.moe.records import Inputs, Routed, State, columns


class Seen(NamedTuple):
    """A layer's routing, as balancers may read it inside the step."""

    inputs: Inputs
    routed: Routed
    assignment: Assignment | SoftAssignment
    distribution: Float[Array, "G S X"]
    context: int
    """Positions of a row."""


def _no_state(moe: config.MoE) -> State:
    return {}


def _no_sums(seen: Seen, moe: config.MoE) -> Stats:
    return {}


def _unchanged(state: State, stats: Stats, moe: config.MoE) -> State:
    return {}


@dataclasses.dataclass(frozen=True)
class Balancer:
    """One kind of balancer; its option is its name in BALANCERS and in the config, and 0 turns it off."""

    loss: Callable[[Stats, config.MoE], Float[Array, ""]] | None = None
    """On the sums of one layer; its coefficient is the option."""
    weight: str | None = None
    """Name of a state that multiplies the coefficient."""
    sums: Callable[[Seen, config.MoE], Stats] = _no_sums
    """Named sums over valid tokens that the loss or the update reads beside those of stats.py."""
    init: Callable[[config.MoE], State] = _no_state
    """State of one layer."""
    update: Callable[[State, Stats, config.MoE], State] = _unchanged
    """New values of its own state, after a step, from the sums of the global batch."""
    bias: str | None = None
    """Name of a state that is added to the selection scores, never to gates."""
    mix: Callable[[Float[Array, "G S X"], Bool[Array, "G S"], config.MoE], Float[Array, "G S X"]] | None = None
    """Selection scores of whole groups -> selection scores. Looks at later tokens: non-causal."""
    check: Callable[[config.MoE], None] = lambda moe: None


def share(part: Array | np.ndarray, whole: Array | np.ndarray) -> Array:
    """part / whole in fp32, 0 where there is nothing."""
    return part.astype(jnp.float32) / jnp.maximum(whole, 1).astype(jnp.float32)


def targets(moe: config.MoE) -> Float[np.ndarray, " X"]:
    """The share of requests that each column should get: equal among experts, `zero_share` for the zero-computation ones."""
    zero, width = len(moe.zero_experts), columns(moe)
    part = zero / width if moe.zero_share is None else moe.zero_share
    real = np.full(moe.num_experts, (1 - part) / moe.num_experts)
    return np.concatenate([real, np.full(zero, part / max(zero, 1))]).astype(np.float32)
