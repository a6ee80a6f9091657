"""Experts copied, left out, averaged and numbered anew, on real Decoders: the function, moments and the balancers' state."""

import dataclasses

import jax
import numpy as np
import pytest
from checkpoint import operated
from checkpoint.operated import sparse
from train import small

from moejax.checkpoint import gates, regroup
from moejax.checkpoint.surgery import ADAM
from moejax.errors import ConfigError
from moejax.moe.routers import ROUTERS
from moejax.train import step

SAME = 1e-5
ORDER = [[2, 0, 3, 1], [1, 3, 0, 2]]

GROWN = {
    "twice the choices": (True, {"top_k": 2}, {"top_k": 4}),
    "three times, gates that add up to 2": (True, {"top_k": 2, "gate_scale": 2.0}, {"top_k": 6, "num_experts": 12}),
    "probabilities": (True, {"top_k": 2, "renormalize": False}, {"top_k": 4}),
    "softmax after, biases of selection": (True, {"top_k": 2, "score": "softmax_after", "sign_bias": 0.1}, {"top_k": 4}),
    "independent gates": (True, {"top_k": 2, "score": "sigmoid", "renormalize": False}, {"top_k": 4, "gate_scale": 3.0}),
    "one choice": (True, {"top_k": 1, "renormalize": False}, {}),
    "one choice by sigmoid": (True, {"top_k": 1, "score": "sigmoid", "renormalize": False}, {}),
    "switch": (True, {"top_k": 1, "router": "switch"}, {}),
    "every expert": (True, {"top_k": 4, "router": "dense"}, {"top_k": 8}),
    "threshold": (True, {"top_k": 2, "router": "threshold"}, {"top_k": 4}),
    "relu": (True, {"top_k": 2, "router": "relu", "sparsity": 1e-8, "load_balance": 0.0}, {"top_k": 4}),
    "soft slots": (True, {"router": "soft", "soft_slots": 2, "allow_noncausal": True}, {}),
    "the same number of choices": (False, {"top_k": 2}, {}),
    "another score": (False, {"top_k": 2}, {"top_k": 4, "score": "sigmoid"}),
    "hash": (False, {"top_k": 2, "router": "hash"}, {"top_k": 4}),
    "top p": (False, {"top_k": 2, "router": "top_p", "top_p": 0.4}, {"top_k": 4}),
    "gshard": (False, {"top_k": 2, "router": "gshard"}, {}),
    "groups": (False, {"top_k": 2, "router_groups": 2}, {"top_k": 4}),
    "zero experts": (False, {"top_k": 2, "zero_experts": ("zero", "zero")}, {"top_k": 4}),
}  # fmt: skip


def pair(before, after):
    """Configs of 4 experts and of what becomes of them, 8 unless said otherwise."""
    source = sparse(num_experts=4, **before)
    return source, sparse(**({"num_experts": 8} | before | after))


QUICK = ("twice the choices", "the same number of choices", "selection bias")
"""Each case compiles two models: the others are left to the slow tests."""


def some(names):
    return [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in names]


@pytest.mark.parametrize("name", some(GROWN))
def test_grown_at_step_0(name):
    """Logits to 1e-5 where declared, and not where not."""
    preserves, before, after = GROWN[name]
    source, target = pair(before, after)
    surgery = regroup.grow(source.model, target.model)
    assert surgery.preserves is preserves, surgery.why
    apart, _, _ = operated.moved(source, target, surgery)
    assert (apart < SAME) is preserves, (apart, surgery.why)


PERMUTED = {
    "softmax": (True, {"top_k": 2, "expert_bias": True}),
    "selection bias": (True, {"top_k": 2, "score": "sigmoid", "sign_bias": 0.1, "quantile_bias": 0.1}),
    "threshold": (True, {"top_k": 2, "router": "threshold"}),
    "zero experts": (True, {"top_k": 2, "zero_experts": ("identity", "zero")}),
    "soft slots": (True, {"router": "soft", "soft_slots": 2, "allow_noncausal": True}),
    "expert choice": (
        True,
        {"top_k": 2, "router": "expert_choice", "allow_noncausal": True, "capacity_factor": 1.0, "transport": "scatter"},
    ),
    "hash": (False, {"top_k": 2, "router": "hash"}),
    "groups": (False, {"top_k": 1, "renormalize": False, "router_groups": 2}),
}  # fmt: skip


@pytest.mark.parametrize("name", some(PERMUTED))
def test_permuted_at_step_0(name):
    """Another order in every layer."""
    preserves, moe = PERMUTED[name]
    source = sparse(num_experts=4, **moe)
    surgery = regroup.permute(source.model, source.model, ORDER)
    assert surgery.preserves is preserves, surgery.why
    apart, _, _ = operated.moved(source, source, surgery)
    assert (apart < SAME) is preserves, (apart, surgery.why)


def test_what_goes_along():
    """Weights, router columns, both moments and biases of selection lie in the new order of their layer; counters begin at 0."""
    source = sparse(num_experts=4, sign_bias=0.1, load_balance_overflow=0.1)
    _, before, after = operated.moved(source, source, regroup.permute(source.model, source.model, ORDER))
    channel = "blocks/layers/0/channel"
    for layer, order in enumerate(ORDER):
        for root in ("parameters", f"{ADAM}/mu", f"{ADAM}/nu"):
            for name in ("gate", "up", "down"):
                path = f"{root}/{channel}/experts/0/{name}"
                np.testing.assert_array_equal(after[path][layer], before[path][layer][order])
            path = f"{root}/{channel}/router/logits"
            np.testing.assert_array_equal(after[path][layer], before[path][layer][:, order])
        bias = "routing/sparse/sign_bias"
        np.testing.assert_array_equal(after[bias][layer], before[bias][layer][order])
    weight = "routing/sparse/load_balance_weight"
    np.testing.assert_array_equal(after[weight], before[weight])
    assert not after["routing/sparse/last_fed"].any() and after["step"] == 0
    assert after[f"{ADAM}/count"] == 50 and after["optimizer/1/2/count"] == 0


@pytest.mark.slow
def test_trained_on_after_permuting():
    """Three steps from a trained state and from the same with its experts in another order: the same losses and norms, and the same
    experts in that order."""
    cfg = sparse(num_experts=4, sign_bias=0.01)
    permute = regroup.permute(cfg.model, cfg.model, ORDER)
    identity = regroup.permute(cfg.model, cfg.model, [[0, 1, 2, 3]])
    built, _ = operated.start(cfg)
    trained = operated.trained(cfg)
    with jax.set_mesh(built.mesh), small.quick():
        update = step.make_train_step(built, operated.put(cfg, trained))
        ends = []
        for surgery in (identity, permute):
            now, norms = operated.put(cfg, surgery(trained, operated.flat(cfg))), []
            for i in range(3):
                now, sums, _ = update(now, small.place(small.arrays(i), built.mesh))
                norms.append((float(sums["nats"]), float(sums["gradient_norm"])))
            ends.append((norms, operated.host(now)))
    (norms, end), (others, other) = ends
    np.testing.assert_allclose(others, norms, rtol=1e-5)
    wanted = dataclasses.replace(permute, rules=tuple(r for r in permute.rules if r.source and r.target))(end, other)
    for path, value in wanted.items():
        np.testing.assert_allclose(
            other[path], value, rtol=1e-4, atol=1e-5 * max(np.abs(value).max(), 1e-9), err_msg=path
        )


def test_grown_copies_and_their_scale():
    """Copy j of expert e is expert 2 e + j; where gates are independent the down projection is halved, its moments multiplied."""
    source, target = pair(*GROWN["independent gates"][1:])
    _, before, after = operated.moved(source, target, regroup.grow(source.model, target.model))
    root = "blocks/layers/0/channel/experts/0"
    factor = 1 / 2 / 3.0
    for e in range(8):
        np.testing.assert_array_equal(after[f"parameters/{root}/up"][:, e], before[f"parameters/{root}/up"][:, e // 2])
        for tree, power in (("parameters", 1), (f"{ADAM}/mu", -1), (f"{ADAM}/nu", -2)):
            old, new = before[f"{tree}/{root}/down"], after[f"{tree}/{root}/down"]
            np.testing.assert_allclose(new[:, e], old[:, e // 2] * factor**power, rtol=1e-5)


def test_pruned_and_merged():
    """What is left, and means, bit for bit; the function is another. Merging equal experts keeps it, and undoes growth."""
    source, target = sparse(num_experts=4), sparse(num_experts=2)
    kept = regroup.busiest([[5, 1, 7, 7], [1, 1, 1, 0]], 2)
    assert kept == [[2, 3], [0, 1]]
    surgery = regroup.prune(source.model, target.model, kept)
    apart, before, after = operated.moved(source, target, surgery)
    assert not surgery.preserves and apart > SAME
    up = "parameters/blocks/layers/0/channel/experts/0/up"
    for layer, experts in enumerate(kept):
        np.testing.assert_array_equal(after[up][layer], before[up][layer][experts])

    surgery = regroup.merge(source.model, target.model, regroup.neighbours(4, 2))
    apart, before, after = operated.moved(source, target, surgery)
    assert not surgery.preserves and apart > SAME
    np.testing.assert_allclose(after[up], before[up].reshape(2, 2, 2, *before[up].shape[2:]).mean(axis=2), rtol=1e-6)

    grown = regroup.grow(target.model, sparse(num_experts=4, top_k=4).model)
    old = operated.trained(target)
    again = surgery(grown(old, operated.flat(source)), operated.flat(target))
    for path in old:
        if path.startswith("parameters/"):
            np.testing.assert_allclose(again[path], old[path], rtol=1e-6)


def test_balancers_turned_on_and_off():
    """State that only one of the models has is dropped or fresh."""
    source, target = sparse(num_experts=4, sign_bias=0.1), sparse(num_experts=4, quantile_bias=0.1)
    surgery = regroup.permute(source.model, target.model, ORDER)
    _, _, after = operated.moved(source, target, surgery)
    assert not surgery.preserves and "sign_bias: 0.1 -> 0.0" in surgery.why
    assert not after["routing/sparse/quantile_bias"].any() and "routing/sparse/sign_bias" not in after


def test_every_router_has_a_verdict():
    """A router that is not in the table is promised nothing."""
    assert set(gates.GATES) == set(ROUTERS)
    moe = dataclasses.replace(sparse(num_experts=4).model.moe, router="new")
    assert gates.gates_of(moe) == gates.UNKNOWN
    assert not gates.of_upcycling(moe, 1).preserves


FOUR, EIGHT = {"num_experts": 4}, {"num_experts": 8}
REFUSED = {
    "no multiple": (lambda s, t: regroup.grow(s, t), FOUR, {"num_experts": 6}, "no multiple of 4; set 8"),
    "no permutation": (lambda s, t: regroup.permute(s, t, [[0, 1, 1, 2]]), FOUR, FOUR, "every expert of 0 to 3 once"),
    "an order of another length": (lambda s, t: regroup.permute(s, t, [[0, 1, 2, 3]]), FOUR, EIGHT, "layers of 8"),
    "rows for some layers": (lambda s, t: regroup.permute(s, t, [[0, 1, 2, 3]] * 3), FOUR, FOUR, "2 sparse layers"),
    "an expert that is not there": (lambda s, t: regroup.prune(s, t, [[0, 9]]), FOUR, {"num_experts": 2}, "expert 9"),
    "an expert kept twice": (lambda s, t: regroup.prune(s, t, [[0, 0]]), FOUR, {"num_experts": 2}, "once"),
    "an expert in two groups": (lambda s, t: regroup.merge(s, t, (((0, 1), (1, 2, 3)),)), FOUR, {"num_experts": 2}, "one group"),
    "unequal groups": (lambda s, t: regroup.neighbours(4, 3), FOUR, FOUR, "divisor of 4"),
    "several widths": (lambda s, t: regroup.grow(s, t), FOUR, EIGHT | {"hidden_classes": (4, 8)}, "one width"),
    "other zero experts": (lambda s, t: regroup.grow(s, t), FOUR, EIGHT | {"zero_experts": ("zero",)}, "zero_experts=()"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    """One line with values and remedy."""
    call, before, after, words = REFUSED[name]
    with pytest.raises(ConfigError) as caught:
        call(sparse(**before).model, sparse(**after).model)
    assert words in str(caught.value)
