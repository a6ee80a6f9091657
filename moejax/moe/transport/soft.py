"""Transport of a SoftAssignment: slots are weighted means of a group's tokens, outputs weighted means of its slots."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from moejax.arrays import SoftAssignment
from moejax.moe.transport import buffers
from moejax.moe.transport.plan import Plan

experts = buffers.experts


class Route(NamedTuple):
    assignment: SoftAssignment
    plan: Plan


def route(assignment: SoftAssignment, plan: Plan) -> Route:
    """The weights are the route."""
    return Route(assignment, plan)


def regate(route: Route, gate: Array) -> Route:
    """A slot has no gate of its own."""
    raise TypeError("a SoftAssignment has no gates to replace")


def dispatch(route: Route, x: Float[Array, "G S D"]) -> Float[Array, "L GG c D"]:
    """Every slot its mean of the tokens, in fp32, then in x's type."""
    slots = jnp.einsum("gsec,gsd->egcd", route.assignment.dispatch, x.astype(jnp.float32))
    return buffers.to_experts(slots, route.plan, x.dtype)


def combine(route: Route, rows: Float[Array, "L GG c D"]) -> Float[Array, "G S D"]:
    """Every token its mean of the slots, in fp32."""
    rows = buffers.to_groups(rows, route.plan).astype(jnp.float32)
    return jnp.einsum("gsec,egcd->gsd", route.assignment.combine, rows)
