"""Groups of tokens and their capacity, counted over valid tokens in exact integers."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from moejax import config
from moejax.arrays import NOWHERE
from moejax.errors import ConfigError


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


def group(x: Array | np.ndarray, moe: config.MoE) -> Any:
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
