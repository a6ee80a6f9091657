"""Tokens scattered into capacity buffers and gathered back: linear in tokens where `einsum` is quadratic."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moejax.arrays import Assignment
from moejax.moe.transport import buffers
from moejax.moe.transport.plan import Plan

experts = buffers.experts


class Route(NamedTuple):
    assignment: Assignment
    plan: Plan


def route(assignment: Assignment, plan: Plan) -> Route:
    """The slots are the route."""
    return Route(assignment, plan)


def regate(route: Route, gate: Float[Array, "G A"]) -> Route:
    """The same route with other gates."""
    return Route(dataclasses.replace(route.assignment, gate=gate), route.plan)


def dispatch(route: Route, x: Float[Array, "G S D"]) -> Float[Array, "L GG c D"]:
    """Each token to its slots; slots nobody took are zero."""
    plan = route.plan

    def one(tokens: Array, a: Assignment) -> Array:
        empty = jnp.zeros_like(tokens, shape=(plan.experts, plan.capacity, tokens.shape[-1]))
        return empty.at[a.expert, a.slot].add(tokens[a.token], mode="drop")

    return buffers.to_experts(jax.vmap(one, out_axes=1)(x, route.assignment), plan, x.dtype)


def combine(route: Route, rows: Float[Array, "L GG c D"]) -> Float[Array, "G S D"]:
    """Each kept assignment's row times its gate, summed by token."""
    plan, assignment = route.plan, route.assignment
    gate = jnp.where(assignment.kept, assignment.gate, 0)

    def one(rows: Array, a: Assignment, gate: Array) -> Array:
        mine = rows.at[a.expert, a.slot].get(mode="fill", fill_value=0).astype(jnp.float32)
        y = jnp.zeros_like(mine, shape=(plan.tokens, rows.shape[-1]))
        return y.at[a.token].add(mine * gate[:, None])

    return jax.vmap(one, in_axes=(1, 0, 0))(buffers.to_groups(rows, plan), assignment, gate)
