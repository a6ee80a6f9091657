"""The routing state of all layers: biases, thresholds, adaptive weights, and when each expert was last fed.

Kept by kind of channel and stacked in order of depth, moved once a step from the sums of the global batch. Evaluation reads
it and never moves it.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from moejax import config
from moejax.arrays import Stats
from moejax.layers import kinds
from moejax.models.decoder import Routing
from moejax.moe import balancers
from moejax.moe.records import State, columns
from moejax.moe.routers import ROUTERS


def init(model: config.Model) -> Routing:
    """Before the first step: {"sparse": {name: [layers, ...]}}, empty without sparse layers."""
    layers = kinds.number(model, "sparse")
    if not layers:
        return {}
    keeper = ROUTERS[model.moe.router].keeper
    one: dict[str, Any] = balancers.init(model.moe) | ({} if keeper is None else keeper.init(model.moe))
    one["last_fed"] = jnp.zeros(columns(model.moe), jnp.int32)
    return {"sparse": jax.tree.map(lambda x: jnp.broadcast_to(x, (layers, *x.shape)), one)}


def update(routing: Routing, sums: dict[str, Stats], moe: config.MoE, step: Int[Array, ""]) -> Routing:
    """After a step with these sums; `step` counts it."""
    return {kind: jax.vmap(lambda s, t: _layer(s, t, moe, step))(state, sums[kind]) for kind, state in routing.items()}


def _layer(state: State, stats: Stats, moe: config.MoE, step: Array) -> State:
    keeper = ROUTERS[moe.router].keeper
    moved = balancers.update(state, stats, moe) | ({} if keeper is None else keeper.update(state, stats, moe))
    return state | moved | {"last_fed": jnp.where(fed(stats, moe), step, state["last_fed"])}


def fed(stats: Stats, moe: config.MoE) -> Array:
    """Experts whose load is at least `alarm_share` of their fair share; all of them where nothing was routed."""
    load = stats["load"].astype(jnp.float32)
    return load >= moe.alarm_share * balancers.targets(moe) * jnp.sum(load)
