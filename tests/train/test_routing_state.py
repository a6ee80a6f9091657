"""The routing state over train steps is a NumPy replay of the sums that the steps returned (B11)."""

import dataclasses

import jax
import numpy as np
import pytest
from train import replayed, small

from moejax.moe.inputs import Mode
from moejax.train import metrics, step

BASE = {
    "model.pattern": ("attention+dense", "attention+sparse"), "model.repeats": 2, "model.moe.alarm_share": 0.9,
    "train.learning_rate": 3e-2,
}  # fmt: skip
KINDS = {
    "biases": {
        "model.moe.score": "sigmoid", "model.moe.sign_bias": 0.01, "model.moe.quantile_bias": 0.5, "model.moe.load_balance_overflow": 0.1,
        "model.moe.zero_experts": ("zero",), "model.moe.capacity_factor": 1.0,
    },
    "threshold": {"model.moe.router": "threshold", "model.moe.top_k": 4},
    "relu": {"model.moe.router": "relu", "model.moe.top_k": 8, "model.moe.sparsity": 1e-3, "model.moe.mean_k": 2.0},
}  # fmt: skip
SPREAD = {"mesh.fsdp": 2, "mesh.expert": 2, "train.microbatches": 2}
SLOW = [("biases", {}), ("relu", {}), ("threshold", {}), ("threshold", SPREAD)]
CASES = [
    ("biases", SPREAD | {"model.remat": "full"}),
    *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW),
]
STATES = {
    "biases": {"sign_bias", "quantile_bias", "load_balance_weight"}, "threshold": {"threshold"}, "relu": {"sparsity_weight"},
}  # fmt: skip


def layer(tree, i):
    return {name: x[i] for name, x in tree.items()}


@pytest.mark.parametrize("kind,options", CASES)
def test_b11_state_is_a_replay_of_the_logged_sums(kind, options):
    """B11: ten steps with padding, dense layers between, microbatches, a mesh and recomputation, and an evaluation after every
    second step: each state of each layer as NumPy works it out from the sums. Compiling and evaluating move nothing."""
    cfg = small.configure(**BASE | KINDS[kind] | options)
    run = small.build(cfg)
    moe, mesh = cfg.model.moe, run.built.mesh
    now = jax.tree.map(lambda x: x.copy(), run.start)
    wanted = [layer(small.on_host(now.routing["sparse"]), i) for i in range(2)]
    assert set(wanted[0]) == STATES[kind] | {"last_fed"}
    first, moved, hungry = [dict(state) for state in wanted], set(), 0
    with jax.set_mesh(mesh), small.quick():
        evaluate = step.make_eval_step(run.built, run.start, Mode(False, moe.capacity_factor))
        for number in range(1, 11):
            batch = small.place(small.arrays(number), mesh)
            now, sums, _ = run.step(now, batch)
            sums = metrics.to_host(sums)["layers"]["sparse"]
            wanted = [s | replayed.after(s, layer(sums, i), moe, number) for i, s in enumerate(wanted)]
            if number % 2 == 0:
                before = small.on_host(now.routing)
                evaluate(now, batch)
                small.equal(now.routing, before)
            for i, state in enumerate(wanted):
                moved |= {name for name in state if (state[name] != first[i][name]).any()}
                small.close(layer(now.routing["sparse"], i), state, 1e-5)
                hungry += (state["last_fed"] < number).sum()
    assert moved == set(wanted[0]) and hungry


def test_b11_a_warm_up_leaves_the_state():
    """B11: what a run compiles and tries before its first step leaves the state of step 0, which a blank batch does not move."""
    cfg = small.configure(**BASE | KINDS["biases"] | SPREAD | {"model.remat": "full"})
    run = small.build(cfg)
    small.equal(run.start.routing, small.begin(cfg)[1].routing)
    blank = small.arrays(0) | {"valid": np.zeros((small.B, small.T), bool)}
    kept = small.on_host(dataclasses.replace(run.start).routing["sparse"])
    with jax.set_mesh(run.built.mesh):
        now, _, _ = run.step(jax.tree.map(lambda x: x.copy(), run.start), small.place(blank, run.built.mesh))
    after = small.on_host(now.routing["sparse"])
    assert (after.pop("last_fed") == 1).all(), "nothing was routed: nobody is hungry for it"
    small.equal(after, {name: x for name, x in kept.items() if name != "last_fed"})
