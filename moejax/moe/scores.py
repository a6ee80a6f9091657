"""What a router's logits become: the quantity that selects, the gate's score, and the distribution that balancers read."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.scipy.special import ndtri
from jaxtyping import Array, Bool, Float, Int

from moejax import config
from moejax.moe.names import ASSIGNMENT, keep
from moejax.moe.records import Inputs


@dataclasses.dataclass(frozen=True)
class Score:
    """One way to read logits."""

    selection: Callable[[Float[Array, "G S X"]], Float[Array, "G S X"]]
    """What is compared between experts; a selection bias is added to it."""
    score: Callable[[Float[Array, "G S X"]], Float[Array, "G S X"]]
    """What gates are made of."""
    distribution: Callable[[Float[Array, "G S X"]], Float[Array, "G S X"]]
    """Probabilities over experts, for losses and statistics."""
    after: bool = False
    """Gates are a softmax over the chosen logits alone."""


def shares(score: Float[Array, "G S X"]) -> Float[Array, "G S X"]:
    """Non-negative scores divided by their sum; zeros stay zeros."""
    total = jnp.sum(score, axis=-1, keepdims=True)
    return score / jnp.where(total == 0, 1, total)


def sqrt_softplus(logits: Float[Array, "G S X"]) -> Float[Array, "G S X"]:
    """sqrt(log(1 + exp(l)))."""
    return jnp.sqrt(jax.nn.softplus(logits))


def uniform(logits: Float[Array, "G S X"]) -> Float[Array, "G S X"]:
    """1 / X for every expert, whatever the logits."""
    return jnp.full_like(logits, 1 / logits.shape[-1])


def _itself(logits: Array) -> Array:
    return logits


def _softmax(logits: Array) -> Array:
    return jax.nn.softmax(logits)


def _independent(score: Callable[[Array], Array]) -> Score:
    """Experts scored one by one: the score itself selects."""
    return Score(score, score, lambda logits: shares(score(logits)))


SCORES: dict[str, Score] = {
    "softmax": Score(_itself, _softmax, _softmax),
    "softmax_after": Score(_itself, _itself, _softmax, after=True),
    "sigmoid": _independent(jax.nn.sigmoid),
    "sqrt_softplus": _independent(sqrt_softplus),
    "constant": Score(_itself, uniform, uniform),
}


def noisy_logits(inputs: Inputs) -> Float[Array, "G S X"]:
    """H = x W_g + N(0, 1) softplus(x W_noise) (Shazeer et al. 2017, eq. 4); without noise at evaluation."""
    if inputs.noise is None:
        return inputs.logits
    assert inputs.spread is not None
    # The smallest fp32 uniform is 0, whose normal quantile is -inf.
    normal = ndtri(jnp.maximum(inputs.noise, jnp.finfo(jnp.float32).tiny))
    # Saved like the choices made by it: another fusion of the recomputed quantile may round another way.
    return keep(inputs.logits + normal * jax.nn.softplus(inputs.spread), ASSIGNMENT)


def at(scores: Float[Array, "G S X"], expert: Int[Array, "G S K"]) -> Float[Array, "G S K"]:
    """The scores of the chosen experts."""
    return jnp.take_along_axis(scores, expert, axis=-1)


def gates(
    logits: Float[Array, "G S X"], expert: Int[Array, "G S K"], wanted: Bool[Array, "G S K"], moe: config.MoE
) -> Float[Array, "G S K"]:
    """Scores of the chosen experts, divided by the sum of the wanted ones if `renormalize`, times `gate_scale`."""
    score = SCORES[moe.score]
    gate = at(score.score(logits), expert)
    if score.after:
        # Where nothing is wanted the softmax is over everything: no token reads it, and no derivative is NaN.
        gate = jax.nn.softmax(jnp.where(wanted | ~jnp.any(wanted, axis=-1, keepdims=True), gate, -jnp.inf))
    elif moe.renormalize:
        gate = normalized(gate, wanted)
    return gate * moe.gate_scale


def normalized(gate: Float[Array, "G S K"], wanted: Bool[Array, "G S K"]) -> Float[Array, "G S K"]:
    """Divided by the sum over the wanted choices; unchanged where that is 0."""
    total = jnp.sum(jnp.where(wanted, gate, 0), axis=-1, keepdims=True)
    return gate / jnp.where(total == 0, 1, total)
