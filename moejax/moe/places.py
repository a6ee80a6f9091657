"""Choices -> places: who gets a slot where they are short, and where the others go.

Places given token by token keep the past free of the future: a later token never takes an earlier one's slot.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moejax import config
from moejax.arrays import NOWHERE, count, running_sum
from moejax.errors import ConfigError
from moejax.moe.names import ASSIGNMENT, keep
from moejax.moe.records import Choice, Routed


@dataclasses.dataclass(frozen=True)
class Order:
    """Who comes first."""

    ranks: Callable[[Int[Array, "G S K"], Bool[Array, "G S K"], Float[Array, "G S"], int], Int[Array, "G S K"]]
    """(experts, requests, priority of tokens, number of columns) -> rank of each request among those for its expert"""
    causal: Callable[[int], bool]
    """Of k: no rank depends on a later token."""


def one_hot(expert: Int[Array, "*N"], columns: int) -> Bool[Array, "*N X"]:
    return jax.nn.one_hot(expert, columns, dtype=bool)


def by_position(expert: Array, asked: Array, priority: Array, columns: int) -> Array:
    """Token by token, each with its choices in order."""
    k = expert.shape[-1]
    per_token = count(one_hot(expert, columns) & asked[..., None], axis=2)
    before = running_sum(per_token, axis=1) - per_token
    same = (expert[..., :, None] == expert[..., None, :]) & asked[..., None, :]
    earlier = count(same & jnp.tril(jnp.ones((1, 1, k, k), bool), -1), axis=-1)
    return jnp.take_along_axis(before, expert, axis=-1) + earlier


def by_choice(expert: Array, asked: Array, priority: Array, columns: int) -> Array:
    """All first choices before any second (Lepikhin et al. 2020, algorithm 1)."""
    k = expert.shape[-1]
    per_choice = one_hot(expert, columns) & asked[..., None]
    totals = count(per_choice, axis=1)
    ranks = []
    for j in range(k):
        mine = per_choice[:, :, j].astype(jnp.int32)
        before = running_sum(mine, axis=1) - mine + jnp.sum(totals[:, :j], axis=1, dtype=jnp.int32)[:, None]
        ranks.append(jnp.take_along_axis(before, expert[:, :, j : j + 1], axis=-1))
    return jnp.concatenate(ranks, axis=-1)


def by_priority(expert: Array, asked: Array, priority: Array, columns: int) -> Array:
    """Tokens with the largest score first (Riquelme et al. 2021, batch priority routing); ties by position."""
    order = jnp.argsort(-priority, axis=1, stable=True)
    back = jnp.argsort(order, axis=1)

    def take(x: Array, index: Array) -> Array:
        return jnp.take_along_axis(x, index[..., None], axis=1)

    return take(by_position(take(expert, order), take(asked, order), priority, columns), back)


ORDERS: dict[str, Order] = {
    "position": Order(by_position, lambda k: True),
    "choice_major": Order(by_choice, lambda k: k == 1),
    "priority": Order(by_priority, lambda k: False),
}


def check(moe: config.MoE) -> None:
    """The order exists, and goes with what else is asked."""
    if moe.order not in ORDERS:
        raise ConfigError(f"model.moe.order={moe.order!r} is not an order; choose one of {', '.join(ORDERS)}")
    if not ORDERS[moe.order].causal(moe.top_k) and not moe.allow_noncausal:
        raise ConfigError(
            f"model.moe.order={moe.order} with top_k={moe.top_k} lets future tokens take the places of past ones, which an "
            f"autoregressive model must not; set model.moe.order=position or model.moe.allow_noncausal=True"
        )
    if moe.reroute and moe.order != "position":
        raise ConfigError(
            f"model.moe.reroute with model.moe.order={moe.order}: overflow is rerouted token by token; set order=position"
        )
    if (moe.reroute or moe.order != "position") and moe.capacity_factor is None:
        raise ConfigError(
            f"model.moe.order={moe.order}, reroute={moe.reroute} with model.moe.capacity_factor=null: no place is ever short; "
            f"set a capacity factor, or order=position and reroute=False"
        )


def limits(limit: Int[Array, " G"], experts: int, columns: int, most: int) -> Int[Array, "G X"]:
    """Places by group and column: `limit` for experts, no limit for zero-computation ones."""
    real = jnp.arange(columns, dtype=jnp.int32)[None] < experts
    return jnp.where(real, limit[:, None], jnp.int32(most))


def place(
    choice: Choice, valid: Bool[Array, "G S"], limit: Int[Array, " G"], priority: Float[Array, "G S"], moe: config.MoE
) -> Routed:
    """A slot for every request whose rank is below its expert's limit; the others rerouted if the config says so."""
    groups, size, k = choice.expert.shape
    columns = choice.preference.shape[-1]
    asked = choice.wanted & valid[..., None]
    room = limits(limit, moe.num_experts, columns, size * k)
    if moe.reroute:
        expert, slot = reroute(choice.expert, asked, jax.lax.stop_gradient(choice.preference), room)
        expert = keep(expert, ASSIGNMENT)
    else:
        expert = choice.expert
        rank = ORDERS[moe.order].ranks(expert, asked, jax.lax.stop_gradient(priority), columns)
        free = rank < jnp.take_along_axis(room[:, None], expert, axis=-1)
        slot = jnp.where(asked & free, rank, NOWHERE)
    token = jnp.broadcast_to(jnp.arange(size, dtype=jnp.int32)[None, :, None], (groups, size, k))
    flat = (groups, size * k)
    return Routed(
        token.reshape(flat),
        expert.reshape(flat),
        choice.expert.reshape(flat),
        asked.reshape(flat),
        keep(slot, ASSIGNMENT).reshape(flat),
        choice.excess,
        choice.margin,
        choice.preference,
    )


def reroute(
    expert: Int[Array, "G S K"], asked: Bool[Array, "G S K"], preference: Float[Array, "G S X"], room: Int[Array, "G X"]
) -> tuple[Int[Array, "G S K"], Int[Array, "G S K"]]:
    """Experts and slots, token by token: a request without room goes to the best expert by preference that has room and
    is not among the token's own. Causal, because only earlier tokens have taken places."""
    columns = preference.shape[-1]

    def token(taken: Array, scanned: tuple[Array, Array, Array]) -> tuple[Array, tuple[Array, Array]]:
        expert, asked, preference = scanned
        slots = []
        for j in range(expert.shape[-1]):
            own = jnp.any(one_hot(expert, columns) & asked[..., None], axis=1)
            open_ = (taken < room) & ~own & (preference > -jnp.inf)
            other = jnp.argmax(jnp.where(open_, preference, -jnp.inf), axis=-1).astype(jnp.int32)
            first = expert[:, j]
            fits = jnp.take_along_axis(taken < room, first[:, None], axis=1)[:, 0]
            moved = asked[:, j] & ~fits & jnp.any(open_, axis=-1)
            mine = jnp.where(moved, other, first)
            placed = asked[:, j] & (fits | moved)
            slots.append(jnp.where(placed, jnp.take_along_axis(taken, mine[:, None], axis=1)[:, 0], NOWHERE))
            taken = taken + (one_hot(mine, columns) & placed[:, None]).astype(jnp.int32)
            expert = expert.at[:, j].set(mine)
        return taken, (expert, jnp.stack(slots, axis=-1))

    def first(x: Array) -> Array:
        return x.swapaxes(0, 1)

    start = jnp.zeros_like(preference[:, 0], dtype=jnp.int32)
    _, (experts, slots) = jax.lax.scan(token, start, (first(expert), first(asked), first(preference)))
    return first(experts), first(slots)
