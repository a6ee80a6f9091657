"""What the sparse layer sends, counted in programs compiled for TPU topologies of 8 to 512 chips (B18). Nothing runs on a TPU."""

import collections
import math

import pytest
from aot import programs as aot

from moejax.moe.transport import ragged

pytestmark = aot.MARKS

SCATTER = {"transport": "scatter", "capacity_factor": 1.25}
CROSS = {"expert": 2, "tensor": 2, "context": 2}
RAGGED = {"transport": "ragged", "receive_buffer": 8.0}
CASES = {
    "einsum": ("v5p:2x2x2", {"fsdp": 2, "expert": 4}, {"transport": "einsum", "capacity_factor": 1.25}),
    "scatter": ("v6e:2x4", {"expert": 8}, SCATTER),
    "scatter on 512": ("v5p:8x8x8", {"data": 8, "fsdp": 8, "expert": 8}, SCATTER),
    "ragged": ("v5p:2x2x2", {"fsdp": 2, "expert": 4}, {"transport": "ragged"}),
    "ragged, one round": (
        "tpu7x:4x8x8",
        {"data": 8, "fsdp": 8, "expert": 8},
        {"transport": "ragged", "receive_buffer": 8.0},
    ),
    "gather": ("v5p:2x2x2", {"data": 2, "expert": 4}, {"transport": "gather"}),
    "two slices": ("v6e:2x2", {"data": 2, "expert": 4}, SCATTER, 2),
    "in chunks": ("v5p:2x2x2", {"expert": 8}, SCATTER | {"chunks": 2}),
    "cut": ("v5p:2x2x2", CROSS, SCATTER),
    "folded": ("v5p:2x2x2", CROSS, SCATTER | {"tensor": "experts"}),
    "ragged, cut": ("v5p:2x2x2", CROSS, RAGGED),
    "ragged, folded": ("tpu7x:2x2x2", {"fsdp": 2} | CROSS, RAGGED | {"tensor": "experts"}),
}
"""Topology, mesh, options of the layer, slices."""
TO, BACK = ("all-to-all", "dispatch"), ("all-to-all", "combine")
LOGITS, SCATTERED, PART = ("all-gather", "route"), ("reduce-scatter", ""), ("all-gather", "combine")
"""Where positions are cut: logits of whole groups; buffers joined, and parted again; or, of the backward pass, gradients of what was
gathered."""
HOME = ("all-gather", "")
"""Outputs, where the tokens of the layer lie over `tensor` too."""
COUNTS, ROWS = ("all-to-all", "dispatch"), ("ragged-all-to-all", "experts")
FORWARD = {
    "einsum": {TO: 1, BACK: 1},
    "scatter": {TO: 1, BACK: 1},
    "scatter on 512": {TO: 1, BACK: 1},
    "ragged": {COUNTS: 1, ROWS: 4},
    "ragged, one round": {COUNTS: 1, ROWS: 2},
    "gather": {("all-gather", "dispatch"): 5, SCATTERED: 1},
    "in chunks": {TO: 2, BACK: 2},
    "cut": {LOGITS: 1, SCATTERED: 1, TO: 1, BACK: 1, PART: 1},
    "folded": {LOGITS: 1, SCATTERED: 1, TO: 1, BACK: 1, PART: 1, HOME: 1},
    "ragged, cut": {LOGITS: 1, COUNTS: 1, ROWS: 2},
    "ragged, folded": {LOGITS: 1, COUNTS: 1, ROWS: 2, HOME: 1},
}
"""Of tokens and their routing, by stage. With several rounds, `ragged` has a first one and a loop of further ones."""
BACKWARD = {
    "einsum": {TO: 1, BACK: 1},
    "scatter": {TO: 1, BACK: 1},
    "scatter on 512": {TO: 1, BACK: 1},
    "ragged": {ROWS: 5},
    "ragged, one round": {ROWS: 2},
    "gather": {SCATTERED: 1, ("all-gather", "combine"): 1},
    "in chunks": {TO: 2, BACK: 2},
    "cut": {("all-gather", "dispatch"): 1, TO: 1, BACK: 1, SCATTERED: 1},
    "folded": {("all-gather", "dispatch"): 1, TO: 1, BACK: 1, SCATTERED: 1, HOME: 1},
    "ragged, cut": {ROWS: 2},
    "ragged, folded": {ROWS: 2, HOME: 1, SCATTERED: 1},
}
"""What the backward pass adds: a round after the first exchanges again. The gates' gradient in `gather` is small enough for the
compiler to make an all-reduce of it."""


@pytest.fixture(scope="module")
def programs():
    """Of each case, its collectives forward, and forward and backward."""
    keys = ("topology", "mesh", "moe", "slices")
    return aot.run("compiled.py", {name: dict(zip(keys, case, strict=False)) for name, case in CASES.items()})


@pytest.fixture(scope="module")
def policies():
    """Two scanned layers under every policy, through an exchange of capacity buffers and one of rows."""
    moe = {"scatter": SCATTER, "ragged": RAGGED}
    eight = {"topology": "v5p:2x2x2", "mesh": {"expert": 8}}
    both = eight | {"parts": ["both"]}
    cases = {(t, policy): both | {"moe": moe[t], "remat": policy} for t in moe for policy in POLICIES}
    return aot.run("compiled.py", cases)


BUFFERS = (0.5, 1.25, 2.5, 8.0)


@pytest.fixture(scope="module")
def buffers():
    """The exchange of rows with receive buffers of several sizes; the last holds whatever comes."""
    eight = {"topology": "v5p:2x2x2", "mesh": {"expert": 8}}
    return aot.run("compiled.py", {b: eight | {"moe": {"transport": "ragged", "receive_buffer": b}} for b in BUFFERS})


def of_tokens(found):
    """(kind, stage) -> how many: without the weights' gathering and reducing, sums of gradients, and what the transpose of a ragged
    exchange asks of its sizes, four integers a device."""
    counted = collections.Counter()
    for kind, dtype, _, name, *_ in found:
        stage = next(s for s in ("route", "count", "dispatch", "experts", "combine", "") if f"/{s}/" in name or not s)
        stage = "" if kind == "reduce-scatter" and stage != "experts" else stage  # some compilers drop its name
        weights = stage == "experts" and kind in ("all-gather", "reduce-scatter")
        offsets = stage == "experts" and kind == "all-to-all" and dtype == "s32"
        if not weights and not offsets and kind != "all-reduce":
            counted[kind, stage] += 1
    return dict(counted)


@pytest.mark.parametrize("name", FORWARD)
def test_b18_collectives_by_stage(programs, name):
    """Tokens cross the expert axis as often as the ledger says, forward and backward, and nothing else does."""
    forward, both = (of_tokens(programs[name][part]) for part in ("forward", "both"))
    assert forward == FORWARD[name]
    added = collections.Counter(both) - collections.Counter(forward)
    assert dict(added) == BACKWARD[name]


@pytest.mark.parametrize("name", CASES)
def test_b18_expert_weights_stay_on_their_devices(programs, name):
    """What is gathered of the weights is one device's experts, over fsdp, and never those of another device; their gradients are
    reduced in fp32, each device keeping its piece, and never whole."""
    mesh = CASES[name][1]
    replicated = mesh.get("data", 1) * mesh.get("context", 1) > 1
    folded = CASES[name][2].get("tensor") == "experts"
    experts, stored = 16 // mesh["expert"] // (mesh["tensor"] if folded else 1), mesh.get("fsdp", 1)
    found = programs[name]["both"]
    gathered = [s for kind, _, s, op, *_ in found if kind == "all-gather" and "/experts/" in op]
    assert [s[0] for s in gathered] == [experts] * (3 if stored > 1 else 0)
    pieces = [
        (dtype, math.prod(s)) for kind, dtype, s, op, *_ in found if kind == "reduce-scatter" and "/experts/" in op
    ]
    matrix = experts * 256 * 384
    if stored > 1:
        assert sorted(pieces) == [("f32", matrix // stored)] * 3
        most = max(matrix // stored if replicated else 0, matrix - 1)
        assert all(math.prod(s) <= most for kind, _, s, *_ in found if kind == "all-reduce")


def test_data_lies_between_slices(programs):
    """Every other axis lies within a slice. The compiler for several slices strips names, so kinds alone are counted."""
    assert programs["two slices"]["slices"] == [[0], [1]]
    counts = [sum(c[0] == "all-to-all" for c in programs["two slices"][part]) for part in ("forward", "both")]
    assert counts == [2, 4]


@pytest.mark.parametrize("name", ["einsum", "scatter", "scatter on 512", "two slices", "cut"])
def test_bytes_of_a_capacity_exchange(programs, name):
    """What leaves a chip in a crossing: groups x experts x C_max x D x bytes x (ep - 1) / ep; where positions are cut, of a chip's piece of
    the places."""
    mesh = CASES[name][1]
    groups, experts, slots, width, ep = 2, 16, math.ceil(1.25 * 2 * 128 / 16), 256, mesh["expert"]
    crossings = [c for c in programs[name]["forward"] if c[0] == "all-to-all"]
    assert len(crossings) == 2
    for _, dtype, _, _, size, devices in crossings:
        assert dtype == "bf16" and devices == ep
        places = slots // mesh.get("context", 1)
        assert size * (devices - 1) / devices == groups * experts * places * width * 2 * (ep - 1) / ep


POLICIES = {"none": 4, "exchanged": 4, "selective": 6, "full": 6}
"""Crossings of a layer, forward and backward, under each policy of recomputation; docs/shapes.md has the row."""


@pytest.mark.parametrize("transport", ["scatter", "ragged"])
@pytest.mark.parametrize("policy", POLICIES)
def test_b18_crossings_by_remat_policy(policies, transport, policy):
    """Saved rows cross four times; policies that make them again send them again."""
    kinds = collections.Counter(c[0] for c in policies[transport, policy]["both"] if c[1] == "bf16")
    assert kinds["all-to-all"] + kinds["ragged-all-to-all"] == POLICIES[policy]


@pytest.mark.parametrize("bigger", BUFFERS[1:])
def test_b15_memory_is_that_of_the_buffer(buffers, bigger):
    """B15: what the compiler reserves grows with the receive buffer as the library says of a round, with a backward pass by up to three
    times that; further rounds reserve nothing. The program does not know the routing, so neither does its memory."""
    least, rows = buffers[BUFFERS[0]], 2 * 128 * 2
    said = ragged.round_bytes(bigger, 8, rows, 256, 384, 2) - ragged.round_bytes(BUFFERS[0], 8, rows, 256, 384, 2)
    for part, times in (("forward bytes", 1.5), ("both bytes", 3)):
        grown = buffers[bigger][part] - least[part]
        assert 0.2 * said < grown <= times * said, part
