"""Dropless by exchange: rows sorted by expert go to the devices that own their experts, and come back.

Every device has a receive buffer of `plan.buffer` fair shares, cut into equal parts for the devices that send. What does not fit
goes in further rounds of the same buffer: exact, and within the same memory. A round is: sort, exchange, experts, exchange
back. The rounds after the first keep nothing for the backward pass, which exchanges again.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from moejax import collectives
from moejax.arrays import Assignment, Stats, count, no_gradient
from moejax.kernels.activations import Activation
from moejax.kernels.grouped_mlp import Weights
from moejax.moe import pieces
from moejax.moe.names import EXCHANGED, keep
from moejax.moe.transport import exchange, local
from moejax.moe.transport.local import Rows
from moejax.moe.transport.plan import Plan


class Route(NamedTuple):
    row: Int[Array, "G A"]
    """Place of each assignment among this device's rows, sorted by expert; past the end if it was not kept."""
    gate: Float[Array, "G A"]
    token: Int[Array, "G A"]
    """Its token, counted within the group."""
    source: Int[Array, " N"]
    """Which of this device's tokens each sorted row is."""
    sent: Int[Array, "P L"]
    """Rows from here to each expert, by device."""
    received: Int[Array, "P L"]
    """Rows from each device to the experts here."""
    rounds: Int[Array, ""]
    """Rounds it takes, the same on every device of the mesh."""
    plan: Plan


class Window(NamedTuple):
    """What one round moves."""

    source: Int[Array, "P c"]
    """Sorted row of this device that lies at each place of what is sent; any row where there is none."""
    sent: Int[Array, " P"]
    """Rows that go to each device."""
    received: Int[Array, " P"]
    """Rows that come from each device."""
    group_sizes: Int[Array, " L"]
    """Rows of each expert here."""
    row_index: Int[Array, " R"]
    """Where in the receive buffer each of them lies, in the order of experts."""
    place: Int[Array, " R"]
    """The inverse: place in the order of experts of each row of the buffer; past the end where there is none."""
    back: Int[Array, " N"]
    """Where in what comes back each sorted row of this device lies; past the end if it was not sent in this round."""


def slots(buffer: float, shards: int, rows: int) -> int:
    """Rows that a device can send to each other one in a round, of `rows` in all."""
    return max(1, -(-int(np.ceil(buffer * rows)) // shards))


def _slots(plan: Plan, rows: int) -> int:
    return slots(plan.buffer, plan.shards, rows)


def round_bytes(buffer: float, shards: int, rows: int, width: int, hidden: int, itemsize: int) -> int:
    """Bytes of the arrays that one round makes on a device with `rows` assignments, forward, whatever the routing: its rows sent,
    received, in the order of experts, out of them, back in order and home, each `width` wide, and the experts' pre-activations and
    activations, `hidden` wide in fp32. The TPU compiler has reserved up to 1.4 times that, and 2.8 times with a backward pass."""
    received = shards * slots(buffer, shards, rows)
    return received * (6 * width * itemsize + 3 * hidden * 4)


def route(assignment: Assignment, plan: Plan) -> Route:
    """Sorted by expert, then group, then slot: the rank needs no sort, because a slot is already a rank."""
    assignment = pieces.ranked(assignment, plan.experts) if plan.cut else assignment
    sizes = count(jax.nn.one_hot(assignment.expert, plan.experts, dtype=bool) & assignment.kept[..., None], axis=1)
    totals = jnp.sum(sizes, axis=0, dtype=jnp.int32)
    first = jnp.cumsum(totals, dtype=jnp.int32) - totals
    offset = first[None, :] + jnp.cumsum(sizes, axis=0, dtype=jnp.int32) - sizes
    sent_here = assignment.kept & (assignment.expert < plan.experts)
    start = jnp.take_along_axis(offset, jnp.minimum(assignment.expert, plan.experts - 1), axis=1)
    rows = assignment.expert.size
    row = jnp.where(sent_here, start + jnp.where(sent_here, assignment.slot, 0), rows)
    groups = assignment.expert.shape[0]
    token = plan.tokens * jnp.arange(groups, dtype=jnp.int32)[:, None] + assignment.token
    source = jnp.zeros_like(row, shape=(rows,)).at[row.reshape(-1)].set(token.reshape(-1), mode="drop")
    sent = totals.reshape(plan.shards, plan.local)
    received = collectives.all_to_all(sent, plan.axis, split=0, concat=0)
    most = jnp.max(jnp.sum(sent, axis=1, dtype=jnp.int32))
    rounds = collectives.everywhere_max(-(-most // _slots(plan, rows)))
    return Route(row, assignment.gate, assignment.token, source, sent, received, rounds, plan)


def regate(route: Route, gate: Float[Array, "G A"]) -> Route:
    """The same route with other gates."""
    return route._replace(gate=gate)


def dispatch(route: Route, x: Float[Array, "G S D"]) -> Rows:
    """This device's tokens and which of them each sorted row is. They are sent a round at a time, with the experts."""
    return Rows(x.reshape(-1, x.shape[-1]), route.source)


def experts(
    route: Route, rows: Rows, weights: tuple[Weights, ...], impl: str, activation: Activation
) -> Float[Array, "N D"]:
    """This device's sorted rows, each through its expert wherever that is; zero past the last one kept."""
    x, route = rows.x, route._replace(source=rows.row_index)
    first = _round(jnp.zeros_like(route.rounds), route, x, weights, impl, activation)
    most = route.source.shape[0]
    if _slots(route.plan, most) >= most:  # one round holds whatever comes
        return first
    further: Array = _further(x, weights, route, impl, activation)  # pyright: ignore[reportAssignmentType]
    return first + further


def combine(route: Route, rows: Float[Array, "N D"]) -> Float[Array, "G S D"]:
    """Each kept assignment's row times its gate, summed by token, in fp32."""

    groups, tokens = route.row.shape[0], route.plan.tokens
    token = tokens * jnp.arange(groups, dtype=jnp.int32)[:, None] + route.token
    row, token, gate = (a.reshape(-1) for a in (route.row, token, route.gate))
    y = local.home(rows, row, token, gate, groups * tokens, route.plan.by_token)
    return y.reshape(groups, tokens, -1)


def sums(route: Route) -> Stats:
    """Rows whose expert is on another device; rounds, and in how many exchanges. They depend on the mesh."""
    elsewhere = jnp.arange(route.plan.shards, dtype=jnp.int32) != collectives.place(route.plan.axis)
    sent = jnp.sum(jnp.where(elsewhere[:, None], route.sent, 0), dtype=jnp.int32)
    return {"rows_sent": sent, "rounds": route.rounds, "exchanges": jnp.ones_like(route.rounds)}


def _window(t: Int[Array, ""], route: Route) -> Window:
    """Round t moves rows t c to (t + 1) c of what each device has for each other one."""
    plan, rows = route.plan, route.source.shape[0]
    c = _slots(plan, rows)
    j = t * c + jnp.arange(c, dtype=jnp.int32)

    to = jnp.sum(route.sent, axis=1, dtype=jnp.int32)
    begin = jnp.cumsum(to, dtype=jnp.int32) - to
    source = jnp.minimum(begin[:, None] + j[None], rows - 1)
    r = jnp.arange(rows, dtype=jnp.int32)
    device = jnp.sum(r[:, None] >= (begin + to)[None, :], axis=1, dtype=jnp.int32)
    nth = r - begin.at[device].get(mode="fill", fill_value=0) - t * c
    moved = (device < plan.shards) & (nth >= 0) & (nth < c)
    back = jnp.where(moved, device * c + nth, plan.shards * c)

    ends = jnp.cumsum(route.received, axis=1, dtype=jnp.int32)
    starts = ends - route.received
    inside = jnp.clip(ends, t * c, (t + 1) * c) - jnp.clip(starts, t * c, (t + 1) * c)
    sizes = jnp.sum(inside, axis=0, dtype=jnp.int32)
    ahead = (jnp.cumsum(sizes, dtype=jnp.int32) - sizes)[None] + jnp.cumsum(inside, axis=0, dtype=jnp.int32) - inside
    expert = jnp.sum(j[None, :, None] >= ends[:, None, :], axis=2, dtype=jnp.int32)
    here = expert < plan.local
    at = jnp.minimum(expert, plan.local - 1)
    into = j[None] - jnp.maximum(jnp.take_along_axis(starts, at, axis=1), t * c)
    place = jnp.where(here, jnp.take_along_axis(ahead, at, axis=1) + into, plan.shards * c).reshape(-1)
    buffer = jnp.arange(plan.shards * c, dtype=jnp.int32)
    row_index = jnp.zeros_like(place).at[place].set(buffer, mode="drop")
    sent, received = jnp.clip(to - t * c, 0, c), jnp.sum(inside, axis=1, dtype=jnp.int32)
    return Window(source, sent, received, sizes, row_index, place, back)


def _round(
    t: Int[Array, ""],
    route: Route,
    x: Float[Array, "M D"],
    weights: tuple[Weights, ...],
    impl: str,
    activation: Activation,
) -> Float[Array, "N D"]:
    """What one round makes of this device's sorted rows; zero for those it does not move."""
    w, swap = _window(t, route), exchange.of(route.plan)
    send = x[route.source[w.source.reshape(-1)]].reshape(*w.source.shape, x.shape[-1])
    arrived = keep(swap(send, w.sent, w.received).reshape(-1, x.shape[-1]), EXCHANGED)
    y = local.experts(Rows(arrived, w.row_index, w.place[:, None]), w.group_sizes, weights, impl, activation)
    y = y.at[w.place].get(mode="fill", fill_value=0).reshape(send.shape)
    home = keep(swap(y, w.received, w.sent).reshape(-1, x.shape[-1]), EXCHANGED)
    return home.at[w.back].get(mode="fill", fill_value=0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _further(
    x: Float[Array, "M D"], weights: tuple[Weights, ...], route: Route, impl: str, activation: Activation
) -> Float[Array, "N D"]:
    """The rounds after the first."""

    def turn(carry: tuple[Array, Array]) -> tuple[Array, Array]:
        t, y = carry
        return t + 1, y + _round(t, route, x, weights, impl, activation)

    start = jnp.ones_like(route.rounds), jnp.zeros_like(x, shape=(route.source.shape[0], x.shape[1]))
    return jax.lax.while_loop(lambda carry: carry[0] < route.rounds, turn, start)[1]


def _further_forward(x: Array, weights: tuple[Weights, ...], route: Route, impl: str, activation: Activation):
    return _further(x, weights, route, impl, activation), (x, weights, route)


def _further_backward(impl: str, activation: Activation, kept: tuple, dy: Array):
    x, weights, route = kept

    def turn(carry):
        t, sums = carry
        pull = jax.vjp(lambda x, w: _round(t, route, x, w, impl, activation), x, weights)[1]
        return t + 1, jax.tree.map(jnp.add, sums, pull(dy))

    start = jnp.ones_like(route.rounds), jax.tree.map(jnp.zeros_like, (x, weights))
    dx, dw = jax.lax.while_loop(lambda carry: carry[0] < route.rounds, turn, start)[1]
    return dx, dw, no_gradient(route)


_further.defvjp(_further_forward, _further_backward)
