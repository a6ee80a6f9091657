"""Choices -> an Assignment: who gets a slot. Capacity is counted per group, over valid tokens, by (position, choice).

Places given token by token keep the past free of the future: a later token never takes an earlier one's slot.
"""

from __future__ import annotations

import math
from fractions import Fraction

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from moejax import config
from moejax.arrays import NOWHERE, Assignment, count, running_sum
from moejax.errors import ConfigError
from moejax.moe.names import ASSIGNMENT, keep
from moejax.moe.router import Choice


def check(moe: config.MoE, context: int) -> None:
    """The rules of groups and capacity."""
    for name in ("capacity_factor", "eval_capacity_factor"):
        factor = getattr(moe, name)
        if factor is None:
            continue
        if not 0 < factor < math.inf:
            raise ConfigError(
                f"model.moe.{name}={factor}: a finite multiple of the fair share, above 0; set 1.25, or null for dropless"
            )
        ratio = Fraction(str(factor)) * moe.top_k / moe.num_experts
        if max(ratio.numerator * context * moe.group_rows, ratio.denominator) > NOWHERE:
            raise ConfigError(
                f"model.moe.{name}={factor}: as a fraction it passes 2**31 with top_k, num_experts and the group's tokens; "
                f"use fewer digits"
            )
    if moe.group_rows < 1:
        raise ConfigError(f"model.moe.group_rows={moe.group_rows}: a group has at least one row; set it to 1")
    window = moe.group_window
    if window is not None and moe.group_rows != 1:
        raise ConfigError(
            f"model.moe.group_window={window} with group_rows={moe.group_rows}: a window lies in one row; set group_rows=1"
        )
    if window is not None and (window < 1 or context % window):
        raise ConfigError(
            f"model.moe.group_window={window} does not divide data.context={context}; choose a divisor or null"
        )


def group(x: Array, moe: config.MoE) -> Array:
    """[B, T, ...] -> [G, S, ...]: whole rows, or windows of one row; several rows are ordered by position, then row."""
    b, t, *rest = x.shape
    if moe.group_window is not None:
        return x.reshape(-1, moe.group_window, *rest)
    if moe.group_rows == 1:
        return x
    return (
        x.reshape(b // moe.group_rows, moe.group_rows, t, *rest).swapaxes(1, 2).reshape(-1, moe.group_rows * t, *rest)
    )


def ungroup(x: Array, moe: config.MoE, context: int) -> Array:
    """The inverse of `group`."""
    g, s, *rest = x.shape
    if moe.group_window is not None:
        return x.reshape(-1, context, *rest)
    if moe.group_rows == 1:
        return x
    return x.reshape(g, context, moe.group_rows, *rest).swapaxes(1, 2).reshape(-1, context, *rest)


def capacity(factor: float | None, k: int, experts: int, tokens: Int[Array, " G"] | int) -> Int[Array, " G"] | int:
    """ceil(factor * k * tokens / experts) in exact integers, at most `tokens`; dropless (None) is `tokens`.

    The factor is the decimal the user wrote: 1.1 is 11/10.
    """
    if factor is None:
        return tokens
    ratio = Fraction(str(factor)) * k / experts
    slots = -(-ratio.numerator * tokens // ratio.denominator)
    return min(slots, tokens) if isinstance(tokens, int) else jnp.minimum(slots, tokens)


def place(choice: Choice, valid: Bool[Array, "G S"], limit: Int[Array, " G"], experts: int) -> Assignment:
    """Slots by (position, choice): the rank of a request among those for the same expert in its group, if below the limit."""
    groups, size, k = choice.expert.shape
    asked = choice.wanted & valid[..., None]
    asks = jax.nn.one_hot(choice.expert, experts, dtype=bool) & asked[..., None]
    per_token = count(asks, axis=2)
    before = running_sum(per_token, axis=1) - per_token
    same = (choice.expert[..., :, None] == choice.expert[..., None, :]) & asked[..., None, :]
    earlier = count(same & jnp.tril(jnp.ones((1, 1, k, k), bool), -1), axis=-1)
    rank = jnp.take_along_axis(before, choice.expert, axis=-1) + earlier
    slot = jnp.where(asked & (rank < limit[:, None, None]), rank, NOWHERE)
    token = jnp.broadcast_to(jnp.arange(size, dtype=jnp.int32)[None, :, None], (groups, size, k))
    flat = (groups, size * k)
    return Assignment(
        token=token.reshape(flat),
        expert=choice.expert.reshape(flat),
        gate=choice.gate.reshape(flat),
        slot=keep(slot, ASSIGNMENT).reshape(flat),
    )
