"""Every transport with every router against the oracle, alone on one device and taken apart on four (B4, B13, B14)."""

import harness
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax import arrays, config, sharding
from moejax.kernels.grouped_mlp import Weights
from moejax.moe.assignment import place
from moejax.moe.layer import Mode
from moejax.moe.router import ROUTERS, Choice
from moejax.moe.transport import TRANSPORTS
from moejax.moe.transport.plan import Plan

pytestmark = pytest.mark.usefixtures("strict_dtypes")

E, T = 8, 8
ROUTER_OPTIONS = {"softmax_topk": {"top_k": 2}, "switch": {"top_k": 1}, "gshard": {"top_k": 2}}
VARIANTS = {
    "tight": {},
    "all experts": {"router": "softmax_topk", "top_k": E, "renormalize": False, "gate_scale": 2.5},
    "pairs of rows": {"group_rows": 2},
    "windows": {"group_window": 4},
}
CASES = [(t, r, "tight", 1.0) for t in TRANSPORTS for r in ROUTERS]
CASES += [(t, r, "tight", None) for t in TRANSPORTS if TRANSPORTS[t].dropless for r in ROUTERS]
CASES += [(t, "softmax_topk", v, 0.7) for t in TRANSPORTS for v in VARIANTS if v != "tight"]


def inputs():
    """The shapes of trouble, all of one array shape so that one compilation serves them."""
    p = harness.problem(seed=1, experts=E, positions=T)
    one, few = np.zeros_like(p.valid), np.zeros_like(p.valid)
    one[2, 5] = True
    few[0, :3] = few[3, 6:] = True
    yield "mixed", p
    yield "none valid", p._replace(valid=np.zeros_like(p.valid))
    yield "one valid", p._replace(valid=one)
    yield "fewer than experts", p._replace(valid=few)
    yield "all valid", p._replace(valid=np.ones_like(p.valid))
    yield "all to one expert", harness.all_to(p, 5)
    yield "all tie", p._replace(router=np.zeros_like(p.router))


@pytest.mark.parametrize(("transport", "router", "variant", "factor"), CASES)
def test_b13_matches_the_oracle(mesh_of, transport, router, variant, factor):
    """B4, B13, B14: outputs, sums and gradients; integers exactly; experts nobody visits get exactly zero."""
    options = {"router": router, **ROUTER_OPTIONS[router], **VARIANTS[variant]}
    moe = config.MoE(num_experts=E, hidden=4, transport=transport, capacity_factor=factor, **options)
    mode = Mode(True, factor)
    for name, p in inputs():
        actual, wanted = harness.run(p, mesh_of(), moe, mode), harness.expected(p, moe, mode)
        harness.same(actual, wanted)
        sums, gradients = actual[2], actual[3]
        assert sums["routed"] + sums["rerouted"] + sums["dropped"] == sums["requested"], name
        assert factor is not None or sums["dropped"] == 0, name
        assert not actual[1][~p.valid].any(), name
        for gradient in gradients[2:]:
            assert not gradient[sums["load"] == 0].any(), name
    assert not harness.run(next(inputs())[1]._replace(valid=np.zeros((4, T), bool)), mesh_of(), moe, mode)[3][1].any()


def test_every_router_has_a_case():
    assert set(ROUTER_OPTIONS) == set(ROUTERS)


# ---- taken apart -------------------------------------------------------------------------------------------------

GROUPS, TOKENS, WIDTH, CAPACITY, SHARDS = 8, 6, 4, 2, 4


@pytest.fixture(scope="module")
def parts():
    """An assignment that drops, leaves slots empty and one expert (7) without tokens; vectors; expert weights."""
    rng = np.random.default_rng(3)
    expert = np.argsort(rng.random((GROUPS, TOKENS, E - 1)), axis=-1)[..., :2].astype(np.int32)
    choice = Choice(
        jnp.asarray(expert), jnp.asarray(rng.random(expert.shape), jnp.float32), jnp.ones(expert.shape, bool)
    )
    valid = jnp.asarray(rng.random((GROUPS, TOKENS)) < 0.7)
    assignment = harness.jit(place, static_argnums=3)(choice, valid, jnp.full(GROUPS, CAPACITY, jnp.int32), E)
    x, dy = (jnp.asarray(rng.normal(size=(GROUPS, TOKENS, WIDTH)), jnp.float32) for _ in range(2))
    w = Weights(
        jnp.asarray(rng.normal(size=(E, WIDTH, 2, 3)), jnp.float32),
        jnp.asarray(rng.normal(size=(E, 3, WIDTH)), jnp.float32),
    )
    return assignment, x, w, dy


def identity(rows):
    """What identity experts return: capacity buffers as they are, a fused gather carried out."""
    return rows.x[rows.row_index] if hasattr(rows, "row_index") else rows


def poison(carrier, route, rows, ones):
    """`rows` with NaN wherever no assignment lies: buffer slots where dispatched ones do not arrive, rows past the groups."""
    if hasattr(route, "group_sizes"):
        live = jnp.arange(rows.shape[0], dtype=jnp.int32)[:, None] < jnp.sum(route.group_sizes, dtype=jnp.int32)
    else:
        live = carrier.dispatch(route, ones) > 0
    return jnp.where(live, rows, jnp.nan), jnp.sum(~live, dtype=jnp.int32)[None]


def poison_source(route, rows):
    """A fused gather's unused indices pointed at a row of NaN; capacity buffers are the layer's own zeros."""
    if not hasattr(rows, "row_index"):
        return rows
    live = jnp.arange(rows.row_index.shape[0], dtype=jnp.int32) < jnp.sum(route.group_sizes, dtype=jnp.int32)
    nan = jnp.full_like(rows.x[:1], jnp.nan)
    return type(rows)(jnp.concatenate([rows.x, nan]), jnp.where(live, rows.row_index, rows.x.shape[0]))


def apart(mesh, transport, poisoned, with_experts):
    """Jitted (assignment, x, weights) -> y, number of poisoned rows: the stages on a mesh of four expert shards."""
    carrier = TRANSPORTS[transport]

    def body(a, x, w):
        w = jax.tree.map(sharding.vary, w)
        route = carrier.route(a, Plan(E, CAPACITY, SHARDS, TOKENS))
        rows = carrier.dispatch(route, x)
        rows = (
            carrier.experts(route, poison_source(route, rows) if poisoned else rows, w, "auto")
            if with_experts
            else identity(rows)
        )
        count = jnp.zeros_like(x, shape=1, dtype=jnp.int32)
        if poisoned:
            rows, count = poison(carrier, route, rows, jnp.ones_like(x))
        return carrier.combine(route, rows), count

    batch, expert = sharding.spec("batch"), sharding.spec("expert")
    step = jax.shard_map(body, in_specs=(batch, batch, expert), out_specs=(batch, batch))

    def value(a, x, w, gate, dy):
        y, count = step(arrays.Assignment(a.token, a.expert, gate, a.slot), x, w)
        return jnp.sum(y * dy), (y, count)

    def placed(a, x, w, dy):
        def put(t, name):
            return jax.device_put(t, jax.NamedSharding(mesh, sharding.spec(name)))

        a, x, w, dy = put(a, "batch"), put(x, "batch"), put(w, "expert"), put(dy, "batch")
        with jax.set_mesh(mesh):
            (_, out), gradients = harness.jit(jax.value_and_grad(value, argnums=(1, 2, 3), has_aux=True))(
                a, x, w, a.gate, dy
            )
        return jax.tree.map(np.asarray, (out, gradients))

    return placed


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_b13_identity_experts_give_the_sum_of_gates(mesh_of, parts, transport):
    """combine(dispatch(x)) = sum(gates) * x over kept assignments, with the gradients of that formula."""
    a, x, w, dy = parts
    (y, _), (dx, _, d_gate) = apart(mesh_of(expert=SHARDS), transport, False, False)(a, x, w, dy)
    token, slot, gate = np.asarray(a.token), np.asarray(a.slot), np.asarray(a.gate)
    kept, total = slot != arrays.NOWHERE, np.zeros((GROUPS, TOKENS))
    for g, i in np.argwhere(kept):
        total[g, token[g, i]] += gate[g, i]
    assert 0 < kept.sum() < kept.size
    harness.close(y, total[..., None] * np.asarray(x))
    harness.close(dx, total[..., None] * np.asarray(dy))
    by_token = (np.asarray(x) * np.asarray(dy)).sum(-1)
    harness.close(d_gate, np.where(kept, np.take_along_axis(by_token, token, 1), 0))


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_b14_unread_rows_may_hold_nan(mesh_of, parts, transport):
    """Poison in rows past the groups and in empty slots changes no bit of outputs and gradients; starved experts get zero."""
    mesh = mesh_of(expert=SHARDS)
    (y, _), clean = apart(mesh, transport, False, True)(*parts)
    (y_, count), dirty = apart(mesh, transport, True, True)(*parts)
    assert count.sum() > 0
    for a, b in zip(jax.tree.leaves((y, clean)), jax.tree.leaves((y_, dirty)), strict=True):
        assert np.isfinite(b).all()
        np.testing.assert_array_equal(a, b)
    assert clean[1].gate_up[:7].any()
    assert not clean[1].gate_up[7].any()
    assert not clean[1].down[7].any()
