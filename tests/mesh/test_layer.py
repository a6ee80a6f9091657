"""The sparse layer on every mesh against the oracle (B1, B2, B13), and the collectives it compiles to (B18 on CPU)."""

import dataclasses
import itertools

import cases
import harness
import jax
import numpy as np
import pytest

from moejax.bench import collectives
from moejax.moe import assignment
from moejax.moe.inputs import Mode
from moejax.moe.places import ORDERS
from moejax.moe.routers import ROUTERS
from moejax.moe.transport import TRAFFIC, TRANSPORTS

pytestmark = pytest.mark.usefixtures("strict_dtypes")

ROWS, POSITIONS, E = 8, 16, 16
MESHES = [
    {},
    {"data": 2},
    {"fsdp": 4},
    {"expert": 8},
    {"fsdp": 2, "expert": 4},
    {"context": 8},
    {"tensor": 2, "fsdp": 2},
    {"data": 2, "fsdp": 2, "expert": 2},
    {"expert": 2, "tensor": 2, "context": 2},
    {"expert": 2, "tensor": 2, "context": 2, "layout": "experts"},
]
"""Devices along each axis, and by `layout` what `tensor` cuts."""
CUBE, CROSS, FOLDED = MESHES[-3:]
TIGHT = Mode(True, 0.75)
DEMANDING = {
    "num_experts": E, "hidden_classes": (12, 20), "zero_experts": ("identity", "constant"), "zero_share": 0.2, "router_dropout": 0.1,
    "sign_bias": 0.001, "gate_scale": 2.0,
}  # fmt: skip


def name(mesh):
    """`fsdp=2 expert=4`, or the transport itself."""
    if isinstance(mesh, str):
        return mesh
    return " ".join(f"{axis}={size}" for axis, size in mesh.items()) or "one"


def laid(mesh_of, sizes):
    """The mesh, and the option that says what `tensor` cuts."""
    axes = {axis: size for axis, size in sizes.items() if axis != "layout"}
    return mesh_of(**axes), {"tensor": sizes.get("layout", "hidden")}


def options(transport, **more):
    """gshard with noise, rerouting, two widths, zero-computation experts, a bias and dropout."""
    return cases.configure("gshard", **{**DEMANDING, "transport": transport, **more})


def problem(moe):
    return harness.problem(moe, seed=7, rows=ROWS, positions=POSITIONS)


def rows_first(p, rows):
    """Only the first rows are valid: a smaller batch padded to the shards."""
    return p._replace(valid=p.valid & (np.arange(ROWS)[:, None] < rows))


def soaked(values, daily):
    """Parameters, of which those not `daily` are left to the soak."""
    return [pytest.param(*v, marks=() if daily(*v) else pytest.mark.soak, id=" ".join(map(name, v))) for v in values]


def everywhere(sizes, transport):
    """All axes, three at a time, and the expert axis alone. One device is in contracts/."""
    return sizes in (CUBE, CROSS, FOLDED, {"expert": 8})


@pytest.mark.parametrize(("sizes", "transport"), soaked(itertools.product(MESHES, TRANSPORTS), everywhere))
def test_b01_b13_the_mesh_changes_nothing(mesh_of, sizes, transport):
    """Sums, outputs, gradients of x, router, experts and constants equal the oracle's, on batches of 8, 3, 2, 1 and no rows."""
    mesh, layout = laid(mesh_of, sizes)
    moe = options(transport, **layout)
    for rows in (8, 3, 2, 1, 0):
        p = rows_first(problem(moe), rows)
        actual = harness.run(p, mesh, moe, TIGHT)
        harness.same(actual, harness.expected(p, moe, TIGHT))
        assert rows < 3 or actual.sums["rerouted"] > 0


@pytest.mark.parametrize("router", ROUTERS)
def test_b01_every_router_on_a_sharded_mesh(mesh_of, router):
    """Each one's demanding case, with its state, its noise and its second head, over fsdp, experts and positions at once."""
    moe = cases.configure(cases.first(router), transport="einsum")
    p, mode = harness.problem(moe, seed=3, rows=ROWS), Mode(True, moe.capacity_factor)
    harness.same(harness.run(p, mesh_of(fsdp=2, expert=2, context=2), moe, mode), harness.expected(p, moe, mode))


WINDOWS = {"group_window": 4, "jitter": 0.1, "load_balance_scope": "sequence", "transport": "scatter"}
PAIRS = {"group_rows": 2, "jitter": 0.1, "load_balance_scope": "group", "transport": "ragged"}


@pytest.mark.parametrize(
    ("case", "more", "sizes"),
    [
        ("soft", {"hidden_classes": (4, 6)}, CUBE),
        ("soft", {"hidden_classes": (4, 8)}, {"fsdp": 2, "expert": 2, "context": 2}),
        ("topk-plain", WINDOWS, CUBE),
        ("topk-plain", WINDOWS, {"expert": 2, "tensor": 2, "context": 2}),
        ("topk-plain", PAIRS, FOLDED),
        ("expert_choice", {"group_rows": 2, "transport": "ragged"}, CROSS),
        ("topk-plain", {"chunks": 2, "transport": "ragged", "receive_buffer": 0.5}, {"expert": 4}),
        ("topk-plain", {"chunks": 4, "transport": "scatter"}, {"expert": 2, "tensor": 2, "context": 2}),
        ("soft", {"chunks": 2}, {"expert": 4}),
        ("gshard", {"chunks": 2, "transport": "gather", "zero_experts": ("identity",)}, {"data": 2, "expert": 2}),
    ],
)  # fmt: skip
def test_b01_what_only_a_mesh_can_break(mesh_of, case, more, sizes):
    """Soft slots of two widths; windows and groups of rows whose positions lie on several devices; groups exchanged in chunks; and the
    sums that balancers add, parts and cosines, as on one device."""
    mesh, layout = laid(mesh_of, sizes)
    moe = cases.configure(case, **more, **layout)
    p, mode = harness.problem(moe, seed=3, rows=ROWS), Mode(True, moe.capacity_factor)
    actual = harness.run(p, mesh, moe, mode)
    harness.same(actual, harness.expected(p, moe, mode))
    if moe.orthogonality:
        alone = harness.forward(p, mesh_of(), moe, mode)[1]
        alone = {key: value for key, value in alone.items() if key not in TRAFFIC}
        assert set(alone) == set(actual.sums) and actual.sums["pairs"] > 0
        for key, value in alone.items():
            harness.close(actual.sums[key], value, 1e-5, key)


@pytest.mark.parametrize("transport", soaked(zip(TRANSPORTS), lambda t: t != "einsum"))
def test_b13_every_device_overrun_and_starved(mesh_of, transport):
    """All tokens to one expert, for each device of the axis in turn: it works alone, every other one starves."""
    moe = cases.configure("topk-plain", orthogonality=0.0, transport=transport)
    for expert in range(cases.E):
        p = harness.all_to(harness.problem(moe, seed=7, rows=ROWS), expert)
        actual = harness.run(p, mesh_of(expert=8), moe, TIGHT)
        assert actual.sums["requests"][expert] == actual.sums["tokens"]
        harness.same(actual, harness.expected(p, moe, TIGHT))


@pytest.mark.parametrize(
    ("sizes", "transport"),
    soaked(
        itertools.product([CUBE, FOLDED], TRANSPORTS),
        lambda s, t: (t == "ragged") == ("layout" in s) and t != "scatter",
    ),
)
def test_b02_padding_changes_nothing(mesh_of, sizes, transport):
    """Eight more invalid positions and eight more invalid rows with contents: valid tokens see no difference."""
    mesh, layout = laid(mesh_of, sizes)
    moe = options(transport, **layout)
    p = problem(moe)
    more = harness.problem(moe, seed=8, rows=2 * ROWS, positions=POSITIONS + 8)

    def pad(x, y):
        y = y.copy()
        y[:ROWS, :POSITIONS] = x
        return y

    wide = p._replace(
        x=pad(p.x, more.x), dy=pad(p.dy, more.dy), valid=pad(p.valid, np.zeros_like(more.valid)), row_ids=more.row_ids,
        ids=pad(p.ids, more.ids),
    )  # fmt: skip
    one, other = harness.run(p, mesh, moe, TIGHT), harness.run(wide, mesh, moe, TIGHT)
    for key in one.sums:
        harness.close(other.sums[key], one.sums[key], 1e-6, key)
    for x, x_ in ((one.y, other.y), (one.gradients["x"], other.gradients["x"])):
        harness.close(x_[:ROWS, :POSITIONS], x, 1e-6)
        assert not x_[ROWS:].any()
        assert not x_[:, POSITIONS:].any()
    harness.close(other.value, one.value, 2e-6)
    for key in one.gradients.keys() - {"x"}:
        harness.close(other.gradients[key], one.gradients[key], 2e-6, key)


def test_b37_row_ids_carry_the_noise(mesh_of):
    """Rows in another order with their ids: the same answer, row by row. With other ids: other noise."""
    moe = options("gather")
    mesh, p = mesh_of(expert=8), problem(moe)
    order = np.random.default_rng(0).permutation(ROWS)
    moved = p._replace(**{key: getattr(p, key)[order] for key in ("x", "valid", "row_ids", "ids", "dy")})
    one, other = harness.run(p, mesh, moe, TIGHT), harness.run(moved, mesh, moe, TIGHT)
    harness.close(other.y, one.y[order], 1e-6)
    harness.close(other.sums["requests"], one.sums["requests"])
    renamed = harness.run(p._replace(row_ids=p.row_ids + 100), mesh, moe, TIGHT)
    assert (renamed.sums["requests"] != one.sums["requests"]).any()


# ---- collectives (B18) ----------------------------------------------------------------------------------------------


def slots_of(moe):
    """C_max of a row."""
    return assignment.capacity(TIGHT.capacity_factor, moe.top_k, E, POSITIONS)


@pytest.mark.parametrize("transport", ["einsum", "scatter"])
def test_b18_all_to_alls(mesh_of, transport):
    """Capacity buffers cross the expert axis twice forward and four times in all; expert weights never do."""
    mesh, moe = mesh_of(expert=8), options(transport)
    alone = dataclasses.replace(TIGHT, training=False)
    forward = harness.compiled(problem(moe), mesh, moe, alone, backward=False).as_text()
    both = harness.compiled(problem(moe), mesh, moe, TIGHT).as_text()
    for text, wanted in ((forward, 2), (both, 4)):
        kinds = [c.kind for c in collectives.of(text)]
        assert kinds.count("all-to-all") == wanted, kinds
        assert "all-gather" not in kinds
        assert "reduce-scatter" not in kinds
        groups, slots = ROWS // 8, slots_of(moe)
        assert all(c.bytes == 4 * E * groups * slots * 8 for c in collectives.of(text) if c.kind == "all-to-all")


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("sizes", [{"expert": 8}, CUBE], ids=name)
def test_b18_expert_weights_stay_home(mesh_of, sizes, transport):
    """No all-gather of a training step has the shape of all expert weights of a width; fsdp gathers a device's own."""
    mesh, moe = mesh_of(**sizes), options(transport)
    p = problem(moe)
    whole = [sorted(shape) for up, down in p.experts for shape in ((*up.shape[:2], up.shape[3]), down.shape)]
    found = collectives.of(harness.compiled(p, mesh, moe, TIGHT).as_text())
    assert found, "the pattern finds nothing"
    gathers = [shape for c in found if c.kind == "all-gather" for shape in c.shapes]
    assert gathers or "fsdp" not in sizes
    assert not any(sorted(shape) in whole for shape in gathers)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_along_axes_of_one_device_nothing_is_sent(mesh_of, transport):
    """Not even to itself, which would be a copy: on one device no collective is left, over `expert` alone none of another size."""
    moe = options(transport)
    p = problem(moe)
    assert not collectives.of(harness.compiled(p, mesh_of(), moe, TIGHT).as_text())
    assert {c.devices for c in collectives.of(harness.compiled(p, mesh_of(expert=8), moe, TIGHT).as_text())} == {8}


# ---- the full product -----------------------------------------------------------------------------------------------


def product():
    """Every router, with every order and rerouting that it reads, through every transport that takes it."""
    for router, kind in ROUTERS.items():
        orders = list(ORDERS) if "order" in kind.reads else ["position"]
        choices = [{"order": order, "reroute": False} for order in orders]
        choices += [{"reroute": True}] if "reroute" in kind.reads else []
        for more in choices:
            for transport in ["einsum"] if kind.soft else TRANSPORTS:
                yield router, {"transport": transport, **more}


@pytest.mark.soak
@pytest.mark.parametrize("sizes", [{"expert": 8}, {"fsdp": 2, "expert": 4}, CUBE, CROSS, FOLDED], ids=name)
@pytest.mark.parametrize(
    ("router", "more"), list(product()), ids=lambda v: str(v) if isinstance(v, str) else str(list(v.values()))
)
def test_b01_every_pair_on_every_mesh(mesh_of, sizes, router, more):
    mesh, layout = laid(mesh_of, sizes)
    moe = cases.configure(cases.first(router), **more, **layout)
    p, mode = harness.problem(moe, seed=3, rows=ROWS), Mode(True, moe.capacity_factor)
    harness.same(harness.run(p, mesh, moe, mode), harness.expected(p, moe, mode))
    harness._COMPILED.clear()  # hundreds of programs, each used once
    jax.clear_caches()
