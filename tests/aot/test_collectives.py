"""What the sparse layer sends, counted in programs compiled for TPU topologies of 8 to 512 chips (B18). Nothing runs on a TPU."""

import collections
import json
import math
import os
import pathlib
import subprocess
import sys

import pytest

LIBTPU = pathlib.Path(sys.prefix) / "tpu"
"""Where `make tpu` puts the compiler, apart from the other packages: with it in their path every command would look for a TPU."""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not LIBTPU.is_dir(), reason="no TPU compiler; make tpu installs it"),
]

SCATTER = {"transport": "scatter", "capacity_factor": 1.25}
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
}
TO, BACK = ("all-to-all", "dispatch"), ("all-to-all", "combine")
COUNTS, ROWS = ("all-to-all", "dispatch"), ("ragged-all-to-all", "experts")
FORWARD = {
    "einsum": {TO: 1, BACK: 1},
    "scatter": {TO: 1, BACK: 1},
    "scatter on 512": {TO: 1, BACK: 1},
    "ragged": {COUNTS: 1, ROWS: 4},
    "ragged, one round": {COUNTS: 1, ROWS: 2},
    "gather": {("all-gather", "dispatch"): 5, ("reduce-scatter", "combine"): 1},
}
"""Of tokens and their routing, by stage. With several rounds, `ragged` has a first one and a loop of further ones."""
BACKWARD = {
    "einsum": {TO: 1, BACK: 1},
    "scatter": {TO: 1, BACK: 1},
    "scatter on 512": {TO: 1, BACK: 1},
    "ragged": {ROWS: 5},
    "ragged, one round": {ROWS: 2},
    "gather": {("reduce-scatter", "dispatch"): 1, ("all-gather", "combine"): 1},
}
"""What the backward pass adds: a round after the first exchanges again. The gates' gradient in `gather` is small enough for the
compiler to make an all-reduce of it."""


@pytest.fixture(scope="module")
def programs():
    """Of each case, its collectives forward, and forward and backward."""
    cases = [dict(zip(("topology", "mesh", "moe"), case, strict=True)) for case in CASES.values()]
    root = pathlib.Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(root), str(LIBTPU)])}
    command = [sys.executable, str(pathlib.Path(__file__).with_name("compiled.py")), json.dumps(cases)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(zip(CASES, json.loads(done.stdout.splitlines()[-1]), strict=True))


def of_tokens(found):
    """(kind, stage) -> how many: without the weights' gathering and reducing, sums of gradients, and what the transpose of a ragged
    exchange asks of its sizes, four integers a device."""
    counted = collections.Counter()
    for kind, dtype, _, name in found:
        stage = next(s for s in ("route", "count", "dispatch", "experts", "combine", "") if f"/{s}/" in name or not s)
        weights = stage == "experts" and kind in ("all-gather", "reduce-scatter")
        offsets = stage == "experts" and kind == "all-to-all" and dtype == "s32"
        if not weights and not offsets and kind != "all-reduce":
            counted[kind, stage] += 1
    return dict(counted)


@pytest.mark.parametrize("name", CASES)
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
    experts, stored = 16 // mesh["expert"], mesh.get("fsdp", 1)
    found = programs[name]["both"]
    gathered = [s for kind, _, s, op in found if kind == "all-gather" and "/experts/" in op]
    assert [s[0] for s in gathered] == [experts] * (2 if stored > 1 else 0)
    pieces = [(dtype, math.prod(s)) for kind, dtype, s, op in found if kind == "reduce-scatter" and "/experts/" in op]
    gate_up, down = experts * 256 * 2 * 384, experts * 384 * 256
    if stored > 1:
        assert sorted(pieces) == sorted([("f32", gate_up // stored), ("f32", down // stored)])
        assert all(math.prod(s) < down for kind, _, s, _ in found if kind == "all-reduce" and mesh.get("data", 1) == 1)


@pytest.mark.parametrize("name", ["einsum", "scatter", "scatter on 512"])
def test_bytes_of_a_capacity_exchange(programs, name):
    """Each crossing moves groups x experts x C_max x D numbers of a device's own, of which 1/ep stays."""
    groups, experts, slots, width = 2, 16, math.ceil(1.25 * 2 * 128 / 16), 256
    crossings = [(dtype, s) for kind, dtype, s, _ in programs[name]["forward"] if kind == "all-to-all"]
    assert len(crossings) == 2
    for dtype, shape in crossings:
        assert dtype == "bf16" and math.prod(shape) == groups * experts * slots * width
