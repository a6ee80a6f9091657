"""What travels between the stages of routing: what a router sees, what tokens ask for, what they get."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moejax import config
from moejax.arrays import NOWHERE

State = dict[str, Array]
"""What a layer's balancers and router carry from step to step, by name; all layers stacked in the train state."""


class Inputs(NamedTuple):
    """All that a router may look at, in groups."""

    logits: Float[Array, "G S L"]
    """Of the router's head; zeros where it has none."""
    spread: Float[Array, "G S X"] | None
    """Of the second head, which scales learned noise."""
    valid: Bool[Array, "G S"]
    ids: Int[Array, "G S"]
    position: Int[Array, "G S"]
    """In the row."""
    noise: Float[Array, "G S n"] | None
    """Uniform numbers; None where the router draws none or at evaluation."""
    hidden: Bool[Array, "G S X"] | None
    """Experts that dropout hides from selection."""
    state: State
    layer: Int[Array, ""]
    step: Int[Array, ""]


class Choice(NamedTuple):
    """What every token asks for, before any capacity. Integers and masks alone."""

    expert: Int[Array, "G S K"]
    wanted: Bool[Array, "G S K"]
    """Requests that are made; what is not wanted counts nowhere."""
    excess: Int[Array, "G S"]
    """Requests beyond the K that can be held: counted as dropped."""
    margin: Float[Array, "G S"]
    """How far the nearest other choice is, in the selection's own unit; 0 where that has no meaning."""
    preference: Float[Array, "G S X"]
    """Selection scores, by which rerouting finds the next best."""


class Routed(NamedTuple):
    """Who goes where: the integers of an Assignment and the count of what became of the requests."""

    token: Int[Array, "G A"]
    expert: Int[Array, "G A"]
    original: Int[Array, "G A"]
    """The expert asked for; another than `expert` where rerouted."""
    asked: Bool[Array, "G A"]
    """Requests of valid tokens."""
    slot: Int[Array, "G A"]
    excess: Int[Array, "G S"]
    margin: Float[Array, "G S"]
    preference: Float[Array, "G S X"] | None
    """Selection scores, where tokens choose by scores."""

    @property
    def kept(self) -> Bool[Array, "G A"]:
        return self.slot != NOWHERE

    @property
    def rerouted(self) -> Bool[Array, "G A"]:
        return self.kept & (self.expert != self.original)


def columns(moe: config.MoE) -> int:
    """X, experts and zero-computation experts."""
    return moe.num_experts + len(moe.zero_experts)


def mean_k(moe: config.MoE) -> float:
    """Requests a token makes on average, where a router steers their number."""
    return moe.top_k / 2 if moe.mean_k is None else moe.mean_k


def nothing(valid: Bool[Array, "G S"]) -> tuple[Int[Array, "G S"], Float[Array, "G S"]]:
    """No excess and no margin."""
    return jnp.zeros_like(valid, dtype=jnp.int32), jnp.zeros_like(valid, dtype=jnp.float32)
