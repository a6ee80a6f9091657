"""How many devices a token's experts lie on. Parts of a group-limited router are sets of devices, so its limit bounds them."""

from __future__ import annotations

import jax.numpy as jnp

from moejax import config
from moejax.arrays import Assignment, Stats, count
from moejax.errors import ConfigError
from moejax.moe.transport.plan import Plan


def sums(placed: Assignment, plan: Plan) -> Stats:
    """`visits`: tokens by the number of expert devices they are sent to, [min(K, P) + 1]. Assignments lie token by token, of
    experts where they lie; it depends on the mesh. Tokens that reach no expert count as visiting none."""
    groups, number = placed.expert.shape
    by_token = (groups, plan.tokens, number // plan.tokens)
    device = (placed.expert // plan.local).reshape(by_token)
    sent = (placed.kept & (placed.expert < plan.experts)).reshape(by_token)
    k = by_token[2]
    same = (device[..., :, None] == device[..., None, :]) & sent[..., None, :]
    again = jnp.any(same & jnp.tril(jnp.ones((1, 1, k, k), bool), -1), axis=-1)
    visited = count(sent & ~again, axis=-1)
    rungs = jnp.arange(min(k, plan.shards) + 1, dtype=jnp.int32)
    return {"visits": count(visited[..., None] == rungs[None, None], axis=(0, 1))}


def bound(moe: config.MoE, devices: int) -> int:
    """Of `devices` that share the experts, how many a token can visit: its choices, or the devices of the groups it keeps."""
    of_group = max(1, devices // moe.router_groups)
    return min(moe.top_k, devices, moe.router_groups_kept * of_group if moe.router_groups > 1 else devices)


def check(moe: config.MoE, devices: int, named: str) -> None:
    """Router groups are whole sets of devices, or several of them lie on one."""
    groups = moe.router_groups
    if groups == 1 or devices == 1:
        return
    if groups % devices and devices % groups:
        raise ConfigError(
            f"model.moe.router_groups={groups} with {named}: a group would lie across devices of another, and the limit on groups "
            f"would not bound the devices a token visits; choose a divisor or a multiple of {devices}"
        )
    if moe.hidden_classes:
        raise ConfigError(
            f"model.moe.router_groups={groups} with hidden_classes={moe.hidden_classes} and {named}: every width lies on all devices, "
            f"so groups of experts are no groups of devices; set router_groups=1 or hidden_classes=()"
        )
