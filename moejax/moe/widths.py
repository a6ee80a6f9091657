"""Experts of different widths in one layer: classes of equal numbers of experts, each class one array of weights."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from moejax import config
from moejax.arrays import Assignment, SoftAssignment
from moejax.errors import ConfigError
from moejax.moe.transport.plan import Plan


def of_classes(moe: config.MoE) -> tuple[int, ...]:
    """Hidden widths, one for each class of experts in order of their ids."""
    return moe.hidden_classes or (moe.hidden,)


def physical(placed: Assignment | SoftAssignment, plan: Plan) -> Assignment | SoftAssignment:
    """Logical expert ids -> where the experts lie. Class c holds ids [c E/n, (c+1) E/n) and is cut over the expert axis by
    itself, so a device has a part of every class: those of class 0, then of class 1, and so on."""
    if plan.classes == 1:
        return placed
    if isinstance(placed, SoftAssignment):
        logical = np.argsort(_where(np.arange(plan.experts), plan))
        return SoftAssignment(placed.dispatch[:, :, logical], placed.combine[:, :, logical])
    expert = jnp.where(placed.expert < plan.experts, _where(placed.expert, plan), placed.expert)
    return dataclasses.replace(placed, expert=expert)


def _where(expert: Array | np.ndarray, plan: Plan) -> Array | np.ndarray:
    """The place of a logical expert."""
    of_class, mine = plan.experts // plan.classes, plan.local // plan.classes
    kind, rest = expert // of_class, expert % of_class
    return (rest // mine) * plan.local + kind * mine + rest % mine


def check(moe: config.MoE) -> None:
    """Positive widths, equal classes."""
    if min(of_classes(moe)) < 1 or moe.num_experts % len(of_classes(moe)):
        raise ConfigError(
            f"model.moe.hidden_classes={moe.hidden_classes}: widths of at least 1, whose number divides num_experts="
            f"{moe.num_experts}; or () for experts of model.moe.hidden alone"
        )
