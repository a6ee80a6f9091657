"""The sparse layer on every mesh against the oracle (B1, B2, B13), and the collectives it compiles to (B18 on CPU)."""

import dataclasses
import re

import harness
import numpy as np
import pytest

from moejax import config
from moejax.moe.layer import Mode
from moejax.moe.transport import TRANSPORTS

pytestmark = pytest.mark.usefixtures("strict_dtypes")

ROWS, POSITIONS, E, F = 8, 16, 8, 12
MESHES = [
    {},
    {"data": 2},
    {"fsdp": 4},
    {"expert": 8},
    {"fsdp": 2, "expert": 4},
    {"data": 2, "fsdp": 2, "expert": 2},
]
TIGHT = Mode(True, 1.0)


def name(mesh):
    return " ".join(f"{axis}={size}" for axis, size in mesh.items()) or "one"


def options(transport, **more):
    return config.MoE(num_experts=E, hidden=F, router="gshard", transport=transport, capacity_factor=1.0, **more)


def problem():
    return harness.problem(seed=7, rows=ROWS, positions=POSITIONS, experts=E, hidden=F)


def rows_first(p, rows):
    """Only the first rows are valid: a smaller batch padded to the shards."""
    return p._replace(valid=p.valid & (np.arange(ROWS)[:, None] < rows))


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("sizes", MESHES, ids=name)
def test_b01_b13_the_mesh_changes_nothing(mesh_of, sizes, transport):
    """gshard with its noise and drops: sums, outputs, gradients of x, router and experts equal the oracle's, on batches of
    8, 3, 2, 1 and no rows."""
    mesh, moe = mesh_of(**sizes), options(transport)
    for rows in (8, 3, 2, 1, 0):
        p = rows_first(problem(), rows)
        actual = harness.run(p, mesh, moe, TIGHT)
        harness.same(actual, harness.expected(p, moe, TIGHT))
        assert rows < 3 or actual[2]["dropped"] > 0


@pytest.mark.parametrize("sizes", [{"expert": 8}, {"data": 2, "fsdp": 2, "expert": 2}], ids=name)
def test_b01_dropless(mesh_of, sizes):
    """Nothing is dropped, with input jitter and groups over rows of one shard or windows."""
    for transport in (t for t, kind in TRANSPORTS.items() if kind.dropless):
        moe, mode = options(transport, jitter=0.1, group_window=4), Mode(True, None)
        actual = harness.run(problem(), mesh_of(**sizes), moe, mode)
        harness.same(actual, harness.expected(problem(), moe, mode))
        assert actual[2]["dropped"] == 0


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_b13_every_device_overrun_and_starved(mesh_of, transport):
    """All tokens to one expert, for each expert of the axis in turn: its device works alone, every other one starves."""
    for expert in range(E):
        p = harness.all_to(problem(), expert)
        actual = harness.run(p, mesh_of(expert=8), options(transport), TIGHT)
        assert actual[2]["requests"][expert] == actual[2]["tokens"]
        harness.same(actual, harness.expected(p, options(transport), TIGHT))


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_b02_padding_changes_nothing(mesh_of, transport):
    """Eight more invalid positions and eight more invalid rows with contents: valid tokens see no difference."""
    mesh, moe, p = mesh_of(fsdp=2, expert=4), options(transport), problem()
    more = harness.problem(seed=8, rows=2 * ROWS, positions=POSITIONS + 8, experts=E, hidden=F)

    def pad(x, y):
        y = y.copy()
        y[:ROWS, :POSITIONS] = x
        return y

    wide = p._replace(
        x=pad(p.x, more.x), dy=pad(p.dy, more.dy), valid=pad(p.valid, np.zeros_like(more.valid)), row_ids=more.row_ids
    )
    value, y, sums, (dx, *d) = harness.run(p, mesh, moe, TIGHT)
    value_, y_, sums_, (dx_, *d_) = harness.run(wide, mesh, moe, TIGHT)
    for key in sums:
        harness.close(sums_[key], sums[key], 1e-6, key)
    for x, x_ in ((y, y_), (dx, dx_)):
        harness.close(x_[:ROWS, :POSITIONS], x, 1e-6)
        assert not x_[ROWS:].any()
        assert not x_[:, POSITIONS:].any()
    for x, x_ in zip((value, *d), (value_, *d_), strict=True):
        harness.close(x_, x, 2e-6)


def test_b37_row_ids_carry_the_noise(mesh_of):
    """Rows in another order with their ids: the same answer, row by row. With other ids: other noise."""
    mesh, moe, mode, p = mesh_of(expert=8), options("gather", jitter=0.1, group_window=4), Mode(True, None), problem()
    order = np.random.default_rng(0).permutation(ROWS)
    moved = p._replace(**{key: getattr(p, key)[order] for key in ("x", "valid", "row_ids", "dy")})
    one, other = harness.run(p, mesh, moe, mode), harness.run(moved, mesh, moe, mode)
    harness.close(other[1], one[1][order], 1e-6)
    harness.close(other[2]["requests"], one[2]["requests"])
    renamed = harness.run(p._replace(row_ids=p.row_ids + 100), mesh, moe, mode)
    assert (renamed[2]["requests"] != one[2]["requests"]).any()


def collectives(text):
    """(result shape, kind) of every collective of a compiled program."""
    kinds = "all-to-all|all-gather|all-reduce|reduce-scatter|collective-permute"
    return re.findall(rf"^ *(?:ROOT )?%\S+ = (.*?) ({kinds})(?:-start)?\(", text, re.MULTILINE)


@pytest.mark.parametrize("transport", ["einsum", "scatter"])
def test_b18_all_to_alls(mesh_of, transport):
    """Capacity buffers cross the expert axis twice forward and four times in all; expert weights never do."""
    mesh, moe = mesh_of(expert=8), options(transport)
    forward = harness.forward(problem(), mesh, moe, dataclasses.replace(TIGHT, training=False)).as_text()
    both = harness.compiled(problem(), mesh, moe, TIGHT).as_text()
    for text, wanted in ((forward, 2), (both, 4)):
        kinds = [kind for _, kind in collectives(text)]
        assert kinds.count("all-to-all") == wanted, kinds
        assert "all-gather" not in kinds
        assert "reduce-scatter" not in kinds


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("sizes", [{"expert": 8}, {"fsdp": 2, "expert": 4}], ids=name)
def test_b18_expert_weights_stay_home(mesh_of, sizes, transport):
    """No all-gather of a training step has the size of all expert weights; fsdp gathers a device's own."""
    mesh, p = mesh_of(**sizes), problem()
    whole = {p.gate_up.size, p.down.size}
    found = collectives(harness.compiled(p, mesh, options(transport), TIGHT).as_text())
    assert found, "the pattern finds nothing"
    gathers = [shape for shape, kind in found if kind == "all-gather"]
    assert gathers or "fsdp" not in sizes
    for shape in gathers:
        for dims in re.findall(r"\[([\d,]*)\]", shape):
            assert int(np.prod([int(d) for d in dims.split(",") if d])) not in whole, shape
