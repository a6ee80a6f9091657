"""What a router is: four functions of arrays and what it declares about itself."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from jaxtyping import Array, Float, Int

from moejax import config
from moejax.arrays import Assignment, SoftAssignment
from moejax.moe import places
from moejax.moe.records import Choice, Inputs, Routed, State, columns
from moejax.moe.scores import SCORES, at, gates

Check = Callable[[config.MoE], None]


def _fine(moe: config.MoE) -> None:
    """No rule of its own."""


def _scores(moe: config.MoE) -> dict[str, int]:
    return {"logits": columns(moe)}


def _distribution(inputs: Inputs, moe: config.MoE) -> Array:
    return SCORES[moe.score].distribution(inputs.logits)


@dataclasses.dataclass(frozen=True)
class Keeper:
    """State that a router carries from step to step."""

    init: Callable[[config.MoE], State]
    sums: Callable[[Inputs, config.MoE], dict[str, Array]]
    """What `update` needs of the valid tokens, as named sums."""
    update: Callable[[State, dict[str, Array], config.MoE], State]


@dataclasses.dataclass(frozen=True)
class Router:
    """One kind of router."""

    assign: Callable[[Inputs, Int[Array, " G"], int, config.MoE], Routed]
    """(inputs, limit of each group, static slots, options) -> integers. No gradient."""
    weigh: Callable[[Inputs, Routed, config.MoE], Assignment | SoftAssignment]
    """Gates on the integers; differentiable. Also on integers that were recorded."""
    causal: bool
    """No choice depends on a later token of the same row."""
    reads: frozenset[str] = frozenset()
    """Options of ROUTER_OPTIONS that it heeds; any other must stay at its default."""
    check: Check = _fine
    heads: Callable[[config.MoE], dict[str, int]] = _scores
    """Projections of the token, by name, and their widths: `logits`, `spread`."""
    distribution: Callable[[Inputs, config.MoE], Float[Array, "G S X"]] = _distribution
    """Probabilities over experts, for losses and statistics."""
    noise: Callable[[config.MoE], int] = lambda moe: 0
    """Uniform numbers per token in training."""
    always_random: bool = False
    """Draws them at evaluation too."""
    bounded: bool = False
    """Has no dropless form: keeps its capacity at evaluation."""
    token_choice: bool = True
    """Assignments lie token by token, top_k each."""
    soft: bool = False
    """Makes a SoftAssignment."""
    keeper: Keeper | None = None


def token_choice(
    choose: Callable[[Inputs, config.MoE], Choice],
    score: Callable[[Inputs, config.MoE], Float[Array, "G S X"]],
) -> Callable[[Inputs, Int[Array, " G"], int, config.MoE], Routed]:
    """The `assign` of a router by which every token chooses: choices, then places. A token's priority, where the order of
    places asks for one, is the score of its first choice (Riquelme et al. 2021, section 3.1)."""

    def assign(inputs: Inputs, limit: Array, slots: int, moe: config.MoE) -> Routed:
        choice = choose(inputs, moe)
        priority = at(score(inputs, moe), choice.expert[..., :1])[..., 0]
        return places.place(choice, inputs.valid, limit, priority, moe)

    return assign


def scored(inputs: Inputs, moe: config.MoE) -> Float[Array, "G S X"]:
    """The config's score of the logits."""
    return SCORES[moe.score].score(inputs.logits)


def by_token(
    gate: Callable[[Inputs, Int[Array, "G S K"], Array, config.MoE], Float[Array, "G S K"]],
) -> Callable[[Inputs, Routed, config.MoE], Assignment]:
    """The `weigh` of a token-choice router, from a function of (inputs, experts, requests, options)."""

    def weigh(inputs: Inputs, routed: Routed, moe: config.MoE) -> Assignment:
        shape = (*inputs.valid.shape, routed.expert.shape[-1] // inputs.valid.shape[-1])
        weights = gate(inputs, routed.expert.reshape(shape), routed.asked.reshape(shape), moe)
        return Assignment(routed.token, routed.expert, weights.reshape(routed.expert.shape), routed.slot)

    return weigh


weigh_by_score = by_token(lambda inputs, expert, asked, moe: gates(inputs.logits, expert, asked, moe))
