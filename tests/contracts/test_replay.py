"""Routing recorded and played back: the same answer; under other weights the same places, new gates, differences counted exactly."""

import cases
import harness
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from moejax.arrays import NOWHERE
from moejax.moe import replay
from moejax.moe.inputs import Mode
from moejax.moe.records import Routed

pytestmark = pytest.mark.usefixtures("strict_dtypes")


def recording(case):
    moe = cases.CONFIGS[case]
    return moe, Mode(True, moe.capacity_factor, record=True), harness.problem(moe, seed=2)


def other_router(p, seed=9):
    """The same problem with slightly other logits."""
    rng = np.random.default_rng(seed)
    heads = {name: w + harness.f32(rng.integers(-1, 2, w.shape) / 8) for name, w in p.heads.items()}
    return p._replace(heads=heads)


def differing(own, old):
    """Requests, of either, whose token, expert or fate is another."""
    number = 0
    for g, a in np.ndindex(own.expert.shape):
        mine, theirs = (
            (bool(r.asked[g, a]), int(r.token[g, a]), int(r.expert[g, a]), bool(r.slot[g, a] == NOWHERE))
            for r in (own, old)
        )
        number += (mine[0] or theirs[0]) and mine != theirs
    return number


def by_hand(p, moe, recorded):
    """y of recorded places with the gates of the problem's own logits."""
    spec = harness.spec_of(moe, None)
    gate_up, down = harness.padded(p.experts)
    w = {"gate_up": gate_up, "down": down, "constant": p.constants}
    logits, y = np.float64(p.x) @ p.heads["logits"], np.zeros(p.x.shape)
    shape = (*p.valid.shape, moe.top_k)
    expert, slot, asked = (a.reshape(shape) for a in (recorded.expert, recorded.slot, recorded.asked))
    for m in np.argwhere(p.valid):
        m = tuple(m)
        gate, _ = oracle.gates(*oracle.SCORES[moe.score](logits[m], spec), expert[m], asked[m], spec)
        for j in np.flatnonzero(slot[m] != NOWHERE):
            y[m] += gate[j] * oracle.output(np.float64(p.x[m]), expert[m][j], w, spec)
    return y


def test_the_same_weights_give_the_same_answer(mesh_of):
    """Outputs, sums and gradients of a rerouting layer with zero-computation experts; nothing is counted as differing."""
    moe, mode, p = recording("topk")
    one, recorded = harness.run(p, mesh_of(), moe, mode)
    again, twice = harness.run(p, mesh_of(), moe, mode, recorded=recorded)
    assert again.sums.pop("mismatched") == 0
    harness.same_sums(again.sums, one.sums, 1e-6)
    harness.close(again.y, one.y, 1e-6)
    for name, gradient in one.gradients.items():
        harness.close(again.gradients[name], gradient, 1e-6, name)
    for a, b in zip(recorded, twice, strict=True):
        np.testing.assert_array_equal(a, b)


def test_other_weights_keep_the_places_and_make_new_gates(mesh_of):
    """The recorded integers with gates recomputed from the logits of now, and as many differences as a loop finds."""
    moe, mode, p = recording("topk")
    one, recorded = harness.run(p, mesh_of(), moe, mode)
    q = other_router(p)
    free, own = harness.run(q, mesh_of(), moe, mode)
    bound, twice = harness.run(q, mesh_of(), moe, mode, recorded=recorded)
    assert 0 < bound.sums["mismatched"] == differing(own, recorded) < bound.sums["requested"]
    np.testing.assert_array_equal(twice.expert, recorded.expert)
    np.testing.assert_array_equal(bound.sums["load"], one.sums["load"])
    harness.close(bound.y, by_hand(q, moe, recorded))
    assert np.abs(bound.y - one.y).max() > 0.1 and np.abs(bound.y - free.y).max() > 0.1
    harness.close(bound.sums["squared_logsumexp"], free.sums["squared_logsumexp"], 1e-6)


def test_experts_that_choose_are_played_back(mesh_of):
    moe, mode, p = recording("expert_choice")
    y, _, recorded = harness.forward(p, mesh_of(), moe, mode)
    again, sums, _ = harness.forward(p, mesh_of(), moe, mode, recorded)
    assert sums["mismatched"] == 0
    harness.close(again, y, 1e-6)
    q = other_router(p)
    own = harness.forward(q, mesh_of(), moe, mode)[2]
    moved, sums, _ = harness.forward(q, mesh_of(), moe, mode, recorded)
    assert sums["mismatched"] == differing(own, recorded) > 0
    assert np.abs(moved - again).max() > 0.1


def test_each_way_to_differ_counts_once():
    """Alike; another expert; another token; dropped; not asked for; asked for; a slot further on, which is no decision."""
    old = {"token": [0, 0, 0, 0, 0, 0, 0], "expert": [1] * 7, "slot": [0, 0, 0, 0, 0, NOWHERE, 3]}
    old["asked"] = [True, True, True, True, True, False, True]
    new = {"token": [0, 0, 1, 0, 0, 0, 0], "expert": [1, 2, 1, 1, 1, 1, 1]}
    new["slot"] = [0, 0, 0, NOWHERE, NOWHERE, 0, 2]
    new["asked"] = [True, True, True, True, False, True, True]

    def routed(columns, excess):
        arrays = {k: jnp.asarray([v], bool if k == "asked" else jnp.int32) for k, v in columns.items()}
        excess = jnp.full((1, 2), excess, jnp.int32)
        return Routed(**arrays, original=arrays["expert"], excess=excess, margin=jnp.zeros((1, 2)), preference=None)

    played, sums = replay.play(replay.record(routed(old, 1)), routed(new, 0))
    assert sums["mismatched"] == 5
    assert played.excess.tolist() == [[1, 1]] and played.slot.tolist() == [old["slot"]]
    assert replay.play(replay.record(played), routed(old, 0))[1]["mismatched"] == 0
