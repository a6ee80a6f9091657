"""Any transport, a part of the groups at a time: the exchange of one part can run under the experts of another.

Nothing orders the parts but what each needs of itself, so that a compiler that starts and ends collectives apart may interleave them.
"""

from __future__ import annotations

import functools
import operator
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moejax.arrays import Assignment, SoftAssignment, Stats
from moejax.kernels.activations import Activation
from moejax.kernels.grouped_mlp import Weights
from moejax.moe.transport.api import Transport
from moejax.moe.transport.plan import Plan


def chunked(carrier: Transport, number: int) -> Transport:
    """The same answers, with `number` exchanges in place of one; `number` divides the groups of a device."""

    def split(tree: Any) -> list[Any]:
        parts = jax.tree.map(lambda x: x.reshape(number, -1, *x.shape[1:]), tree)
        return [jax.tree.map(lambda x, i=i: x[i], parts) for i in range(number)]

    def route(assignment: Assignment | SoftAssignment, plan: Plan) -> tuple:
        return tuple(carrier.route(part, plan) for part in split(assignment))

    def regate(routes: tuple, gate: Float[Array, "G A"]) -> tuple:
        return tuple(carrier.regate(*pair) for pair in zip(routes, split(gate), strict=True))

    def dispatch(routes: tuple, x: Float[Array, "G S D"]) -> tuple:
        return tuple(carrier.dispatch(*pair) for pair in zip(routes, split(x), strict=True))

    def experts(routes: tuple, rows: tuple, weights: tuple[Weights, ...], impl: str, activation: Activation) -> tuple:
        return tuple(carrier.experts(*pair, weights, impl, activation) for pair in zip(routes, rows, strict=True))

    def combine(routes: tuple, rows: tuple) -> Float[Array, "G S D"]:
        return jnp.concatenate([carrier.combine(*pair) for pair in zip(routes, rows, strict=True)])

    def sums(routes: tuple) -> Stats:
        return functools.reduce(functools.partial(jax.tree.map, operator.add), map(carrier.sums, routes))

    return Transport(route, dispatch, experts, combine, regate, sums, carrier.dropless)
