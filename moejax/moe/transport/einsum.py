"""One-hot dispatch and combine tensors [G, S, E, C] (Lepikhin et al. 2020, algorithm 2): dense, simple, the plain twin."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

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


def _one_hot(route: Route, value: Float[Array, "G A"]) -> Float[Array, "G S E C"]:
    """The Assignment as a dense tensor with `value` at each kept assignment."""
    plan = route.plan

    def one(value: Array, a: Assignment) -> Array:
        empty = jnp.zeros_like(value, shape=(plan.tokens, plan.experts, plan.capacity))
        return empty.at[a.token, a.expert, a.slot].add(value, mode="drop")

    return jax.vmap(one)(value, route.assignment)


def regate(route: Route, gate: Float[Array, "G A"]) -> Route:
    """The same route with other gates."""
    return Route(dataclasses.replace(route.assignment, gate=gate), route.plan)


def dispatch(route: Route, x: Float[Array, "G S D"]) -> Float[Array, "L GG c D"]:
    """Each token to its slots by a matmul with zeros and ones."""
    mask = _one_hot(route, jnp.ones_like(route.assignment.gate, dtype=x.dtype))
    return buffers.to_experts(jnp.einsum("gsec,gsd->egcd", mask, x), route.plan, x.dtype)


def combine(route: Route, rows: Float[Array, "L GG c D"]) -> Float[Array, "G S D"]:
    """The same matmul with gates, transposed, in fp32."""
    gates = _one_hot(route, route.assignment.gate)
    rows = buffers.to_groups(rows, route.plan).astype(jnp.float32)
    return jnp.einsum("gsec,egcd->gsd", gates, jnp.where(_taken(route)[..., None], rows, 0))


def _taken(route: Route) -> Bool[Array, "E G C"]:
    """Slots that hold a token. A slot nobody took may hold anything, which zero times does not forget."""
    ones = _one_hot(route, jnp.ones_like(route.assignment.gate))
    return jnp.any(ones > 0, axis=1).swapaxes(0, 1)
