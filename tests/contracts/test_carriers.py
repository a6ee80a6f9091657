"""Transports taken apart on four expert shards: every router's assignments, identity experts, poisoned rows, other gates (B13, B14)."""

import functools

import battery
import cases
import harness
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from moejax import arrays, collectives, sharding
from moejax.kernels.activations import SWIGLU
from moejax.moe import widths
from moejax.moe.routers import ROUTERS
from moejax.moe.transport import TRANSPORTS
from moejax.moe.transport.plan import Plan

pytestmark = pytest.mark.usefixtures("strict_dtypes")

E, GROUPS, TOKENS, WIDTH, SHARDS = cases.E, 8, battery.SIZE, 4, 4
ENTRIES = TOKENS * E
"""Of an assignment: as many as any router makes; what it does not need goes nowhere."""
PLAN = Plan(E, TOKENS, SHARDS, TOKENS, ("expert",), buffer=0.5, classes=2)
"""With room for half a fair share, so that an exchange takes several rounds."""
HIDDEN = (3, 5)


def assignment_of(router):
    """What the router makes of eight groups, padded with entries that go nowhere; expert 7 starved."""
    moe = cases.CONFIGS[cases.first(router)]
    placed = battery.call(moe, battery.draw(moe, seed=6)).placed
    wide = [(0, 0), (0, ENTRIES - placed.expert.shape[1])]
    token, expert = (np.pad(a[:GROUPS], wide) for a in (placed.token, placed.expert))
    gate = np.pad(placed.gate[:GROUPS], wide, constant_values=1)
    slot = np.pad(placed.slot[:GROUPS], wide, constant_values=arrays.NOWHERE)
    return arrays.Assignment(token, expert, gate, np.where(expert == 7, arrays.NOWHERE, slot))


@pytest.fixture(scope="module")
def parts():
    """(x, weights of two classes, dy)."""
    rng = np.random.default_rng(3)
    x, dy = (harness.f32(rng.normal(size=(GROUPS, TOKENS, WIDTH))) for _ in range(2))
    shapes = [((E // 2, WIDTH, 2, f), (E // 2, f, WIDTH)) for f in HIDDEN]
    return x, tuple(harness.parted(*(harness.f32(rng.normal(size=s)) for s in pair)) for pair in shapes), dy


def by_hand(a, x, weights, dy):
    """y, and the gradients of sum(y * dy) by x, weights and gates, assignment by assignment."""
    gate_up, down = harness.padded([harness.joined(w) for w in weights])
    y, dx, d_gate = np.zeros(x.shape), np.zeros(x.shape), np.zeros(a.gate.shape)
    d_up, d_down = np.zeros(gate_up.shape), np.zeros(down.shape)
    for g, i in np.argwhere((a.slot != arrays.NOWHERE) & (a.expert < E)):
        m, e = (g, a.token[g, i]), a.expert[g, i]
        out = oracle.expert(np.float64(x[m]), gate_up[e], down[e])
        back = oracle.expert_backward(np.float64(x[m]), a.gate[g, i] * dy[m], gate_up[e], down[e])
        y[m] += a.gate[g, i] * out
        d_gate[g, i] = dy[m] @ out
        for total, part in zip((dx[m], d_up[e], d_down[e]), back, strict=True):
            total += part
    return y, dx, d_up, d_down, d_gate


def identity(rows):
    """What identity experts return: capacity buffers as they are, a fused gather carried out."""
    return rows.x[rows.row_index] if hasattr(rows, "row_index") else rows


def rows_of(route):
    """Sorted rows that hold an assignment; None for capacity buffers."""
    sizes = getattr(route, "group_sizes", getattr(route, "sent", None))
    return None if sizes is None else jnp.sum(sizes, dtype=jnp.int32)


def poison(carrier, route, rows, ones):
    """`rows` with NaN wherever no assignment lies: buffer slots where dispatched ones do not arrive, rows past the groups."""
    if (used := rows_of(route)) is not None:
        live = jnp.arange(rows.shape[0], dtype=jnp.int32)[:, None] < used
    else:
        live = carrier.dispatch(route, ones) > 0
    return jnp.where(live, rows, jnp.nan), jnp.sum(~live, dtype=jnp.int32)[None]


def poison_source(route, rows):
    """A fused gather's unused indices pointed at a row of NaN; capacity buffers are the layer's own zeros."""
    if not hasattr(rows, "row_index"):
        return rows
    live = jnp.arange(rows.row_index.shape[0], dtype=jnp.int32) < rows_of(route)
    nan = jnp.full_like(rows.x[:1], jnp.nan)
    return type(rows)(jnp.concatenate([rows.x, nan]), jnp.where(live, rows.row_index, rows.x.shape[0]))


@functools.cache
def compiled(mesh, name, poisoned, with_experts):
    carrier = TRANSPORTS[name]

    def body(a, x, w):
        w = jax.tree.map(lambda a: collectives.vary(a, sharding.BATCH_AXES), w)
        route = carrier.route(widths.physical(a, PLAN), PLAN)
        rows = carrier.dispatch(route, x)
        rows = poison_source(route, rows) if poisoned else rows
        rows = carrier.experts(route, rows, w, "auto", SWIGLU) if with_experts else identity(rows)
        count = jnp.zeros_like(x, shape=1, dtype=jnp.int32)
        if poisoned:
            rows, count = poison(carrier, route, rows, jnp.ones_like(x))
        return carrier.combine(route, rows), carrier.combine(carrier.regate(route, 1 - a.gate), rows), count

    batch, expert = sharding.spec("batch"), sharding.spec("expert")
    step = jax.shard_map(body, in_specs=(batch, batch, expert), out_specs=(batch, batch, batch))

    def value(x, w, gate, a, dy):
        y, regated, count = step(arrays.Assignment(a.token, a.expert, gate, a.slot), x, w)
        return jnp.sum(y * dy), (y, regated, count)

    return harness.jit(jax.value_and_grad(value, argnums=(0, 1, 2), has_aux=True))


def apart(mesh, name, a, x, w, dy, poisoned=False, with_experts=True):
    """(y, y with gates 1 - gate, number of poisoned rows), (dx, d_weights, d_gate): the stages on four expert shards."""

    def put(tree, name):
        return jax.tree.map(lambda t: jax.device_put(t, jax.NamedSharding(mesh, sharding.spec(name))), tree)

    a, x, w, dy = put(a, "batch"), put(x, "batch"), put(w, "expert"), put(dy, "batch")
    with jax.set_mesh(mesh):
        (_, out), gradients = compiled(mesh, name, poisoned, with_experts)(x, w, a.gate, a, dy)
    return jax.tree.map(np.asarray, (out, gradients))


@pytest.mark.parametrize("router", [name for name, kind in ROUTERS.items() if not kind.soft])
@pytest.mark.parametrize("name", TRANSPORTS)
def test_b13_every_transport_carries_every_router(mesh_of, parts, name, router):
    """y, the gradients by x, weights and gates; the same places with other gates; a starved expert gets exactly zero."""
    a, (x, w, dy) = assignment_of(router), parts
    (y, regated, _), (dx, dw, d_gate) = apart(mesh_of(expert=SHARDS), name, a, x, w, dy)
    assert (a.slot != arrays.NOWHERE).any()
    y_, dx_, d_up_, d_down_, d_gate_ = by_hand(a, x, w, dy)
    harness.close(y, y_, what="y")
    harness.close(dx, dx_, what="dx")
    d_up, d_down = harness.padded([harness.joined(d) for d in dw])
    harness.close(d_up, d_up_, what="gate_up")
    harness.close(d_down, d_down_, what="down")
    harness.close(d_gate, d_gate_, what="gate")
    assert not d_up[7].any() and not d_down[7].any() and d_up[:7].any()
    other = arrays.Assignment(a.token, a.expert, 1 - a.gate, a.slot)
    harness.close(regated, by_hand(other, x, w, dy)[0], what="other gates")


@pytest.mark.parametrize("name", TRANSPORTS)
def test_b13_identity_experts_give_the_sum_of_gates(mesh_of, parts, name):
    """combine(dispatch(x)) = sum(gates) * x over kept assignments to experts, with the gradients of that formula."""
    a, (x, w, dy) = assignment_of("topk"), parts
    (y, _, _), (dx, _, d_gate) = apart(mesh_of(expert=SHARDS), name, a, x, w, dy, with_experts=False)
    kept, total = (a.slot != arrays.NOWHERE) & (a.expert < E), np.zeros((GROUPS, TOKENS))
    for g, i in np.argwhere(kept):
        total[g, a.token[g, i]] += a.gate[g, i]
    assert 0 < kept.sum() < kept.size
    harness.close(y, total[..., None] * x)
    harness.close(dx, total[..., None] * dy)
    harness.close(d_gate, np.where(kept, np.take_along_axis((x * dy).sum(-1), a.token, 1), 0))


@pytest.mark.parametrize("name", TRANSPORTS)
def test_b14_unread_rows_may_hold_nan(mesh_of, parts, name):
    """Poison in rows past the groups and in empty slots changes no bit of outputs and gradients."""
    mesh, a = mesh_of(expert=SHARDS), assignment_of("gshard")
    (y, _, _), clean = apart(mesh, name, a, *parts)
    (y_, _, count), dirty = apart(mesh, name, a, *parts, poisoned=True)
    assert count.sum() > 0
    for one, other in zip(jax.tree.leaves((y, clean)), jax.tree.leaves((y_, dirty)), strict=True):
        assert np.isfinite(other).all()
        np.testing.assert_array_equal(one, other)
