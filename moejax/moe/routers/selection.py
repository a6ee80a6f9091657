"""Selection scores: the quantity compared between experts, after biases, Sinkhorn, dropout and the limit on groups."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moejax import config
from moejax.errors import ConfigError
from moejax.moe import balancers
from moejax.moe.names import ASSIGNMENT, keep
from moejax.moe.records import Inputs, columns

READS = frozenset(
    {
        "zero_experts", "zero_share", "router_dropout", "router_groups", "router_groups_kept", "router_groups_best",
        "selection_bias", "sign_bias", "quantile_bias", "sinkhorn", "order", "reroute",
    }
)  # fmt: skip
"""Options that a router heeds by selecting through `selection`."""


def selection(scores: Float[Array, "G S X"], inputs: Inputs, moe: config.MoE) -> Float[Array, "G S X"]:
    """Scores shifted and masked for selection alone; what may not be chosen is -inf."""
    scores = balancers.select(jax.lax.stop_gradient(scores), inputs.valid, inputs.state, moe)
    if inputs.hidden is not None:
        scores = jnp.where(inputs.hidden, -jnp.inf, scores)
    return limited(scores, moe.router_groups, moe.router_groups_kept, moe.router_groups_best)


def limited(scores: Float[Array, "G S X"], groups: int, kept: int, best: int = 2) -> Float[Array, "G S X"]:
    """Only the experts of the `kept` groups with the largest sum of their `best` scores: two (DeepSeek-V3 2024, section 2.1.2), or
    one (DeepSeek-V2 2024, section 2.2.2)."""
    if groups == kept:
        return scores
    *lead, width = scores.shape
    parts = scores.reshape(*lead, groups, width // groups)
    rank = jnp.sum(jax.lax.top_k(parts, min(best, width // groups))[0], axis=-1)
    chosen = jax.lax.top_k(rank, kept)[1]
    keeps = jnp.any(jax.nn.one_hot(chosen, groups, dtype=bool), axis=-2)
    return jnp.where(keeps[..., None], parts, -jnp.inf).reshape(scores.shape)


def top(scores: Float[Array, "G S X"], k: int) -> tuple[Int[Array, "G S K"], Float[Array, "G S"]]:
    """Ids of the k largest scores, largest first, ties to the lower id, and the margin to the next; decided once,
    whatever is recomputed. The margin is 0 where there is no finite next."""
    columns = scores.shape[-1]
    value, expert = jax.lax.top_k(jax.lax.stop_gradient(scores), min(k + 1, columns))
    expert = keep(expert, ASSIGNMENT)
    gap = jnp.zeros_like(value[..., 0]) if k == columns else value[..., k - 1] - value[..., k]
    return expert[..., :k], jnp.where(jnp.isfinite(gap), gap, 0)


def check(moe: config.MoE) -> None:
    """Groups divide the experts and leave enough of them; dropout is a probability."""
    if not 0 <= moe.router_dropout < 1:
        raise ConfigError(f"model.moe.router_dropout={moe.router_dropout}: a probability in [0, 1); set 0 for none")
    groups, kept = moe.router_groups, moe.router_groups_kept
    if groups < 1 or not 1 <= kept <= groups or moe.num_experts % groups:
        raise ConfigError(
            f"model.moe.router_groups={groups}, router_groups_kept={kept}: groups divide num_experts={moe.num_experts}, and "
            f"between 1 and all of them are kept; set both to 1 for no limit"
        )
    if moe.router_groups_best < 1 or (groups == 1 and moe.router_groups_best != 2):
        raise ConfigError(
            f"model.moe.router_groups_best={moe.router_groups_best} with router_groups={groups}: at least 1, and 2 where there are no "
            f"groups to rank"
        )
    if moe.top_k > kept * (moe.num_experts // groups):
        raise ConfigError(
            f"model.moe.router_groups_kept={kept} of {groups} groups holds {kept * (moe.num_experts // groups)} experts, fewer "
            f"than top_k={moe.top_k}; keep more groups"
        )
    if groups > 1 and columns(moe) != moe.num_experts:
        raise ConfigError(
            f"model.moe.router_groups={groups} with zero_experts={moe.zero_experts}: zero-computation experts belong to no "
            f"group; set router_groups=1 or zero_experts=()"
        )
