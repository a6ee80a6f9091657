"""Dropless by sorting: all tokens of the expert axis gathered, the local experts' rows sorted and run, the results summed
back to their owners. On one expert shard nothing is sent and this is the plain sorted path.

Memory is that of all assignments of the expert axis, whatever the routing; for large axes exchange rows instead.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moejax import collectives
from moejax.arrays import Assignment, count
from moejax.kernels.activations import Activation
from moejax.kernels.grouped_mlp import Weights
from moejax.moe import pieces
from moejax.moe.names import EXCHANGED, keep
from moejax.moe.transport import local
from moejax.moe.transport.local import Rows
from moejax.moe.transport.plan import Plan


class Route(NamedTuple):
    row: Int[Array, " A"]
    """Row of each assignment of the expert axis among the local experts' sorted rows; past the end if not ours."""
    token: Int[Array, " A"]
    """Its token among all tokens of the expert axis."""
    gate: Float[Array, " A"]
    groups: int
    """Groups of the expert axis."""
    group_sizes: Int[Array, " L"]
    plan: Plan


def _all(x: Array, plan: Plan) -> Array:
    """x of every device of the expert axis, stacked on the leading dimension."""
    return collectives.all_gather(x, plan.axis, axis=0)


def route(assignment: Assignment, plan: Plan) -> Route:
    """Sorted by expert, then group, then slot: the rank needs no sort, because a slot is already a rank."""
    mine = pieces.ranked(assignment, plan.experts) if plan.cut else assignment
    every = jax.tree.map(lambda x: _all(x, plan), mine)
    groups = every.expert.shape[0]
    here = every.expert - collectives.place(plan.axis) * plan.local
    sizes = count(jax.nn.one_hot(here, plan.local, dtype=bool) & every.kept[..., None], axis=1)
    totals = jnp.sum(sizes, axis=0, dtype=jnp.int32)
    first = jnp.cumsum(totals, dtype=jnp.int32) - totals
    offset = first[None, :] + jnp.cumsum(sizes, axis=0, dtype=jnp.int32) - sizes
    ours = every.kept & (here >= 0) & (here < plan.local)
    start = jnp.take_along_axis(offset, jnp.clip(here, 0, plan.local - 1), axis=1)
    row = jnp.where(ours, start + jnp.where(ours, every.slot, 0), every.expert.size)
    tokens = plan.tokens * jnp.arange(groups, dtype=jnp.int32)[:, None] + every.token
    return Route(row.reshape(-1), tokens.reshape(-1), every.gate.reshape(-1), groups, totals, plan)


def regate(route: Route, gate: Float[Array, "G A"]) -> Route:
    """The same route with other gates."""
    return route._replace(gate=_all(gate, route.plan).reshape(-1))


def dispatch(route: Route, x: Float[Array, "G S D"]) -> Rows:
    """All tokens of the expert axis and the index of each sorted row into them."""
    index = jnp.zeros_like(route.row).at[route.row].set(route.token, mode="drop", unique_indices=False)
    inverse = route.row.reshape(route.groups * route.plan.tokens, -1) if route.plan.by_token else None
    return Rows(keep(_all(x.reshape(-1, x.shape[-1]), route.plan), EXCHANGED), index, inverse)


def experts(
    route: Route, rows: Rows, weights: tuple[Weights, ...], impl: str, activation: Activation
) -> Float[Array, "R D"]:
    """The local experts on their rows."""
    return local.experts(rows, route.group_sizes, weights, impl, activation)


def combine(route: Route, rows: Float[Array, "R D"]) -> Float[Array, "G S D"]:
    """Gated rows summed by token over the local experts, then over the expert axis, each device keeping its own tokens."""
    tokens = route.groups * route.plan.tokens
    y = local.home(rows, route.row, route.token, route.gate, tokens, route.plan.by_token)
    own = collectives.psum_scatter(y, route.plan.axis)
    return own.reshape(-1, route.plan.tokens, rows.shape[-1])
