"""Every transport in the layer against the oracle, on one device and on the shapes of trouble (B4, B13, B14)."""

import dataclasses

import cases
import harness
import numpy as np
import pytest

from moejax.kernels.grouped_matmul import BACKENDS
from moejax.moe import layer
from moejax.moe.inputs import Mode
from moejax.moe.routers import ROUTERS
from moejax.moe.transport import TRANSPORTS

pytestmark = pytest.mark.usefixtures("strict_dtypes")

T = 8
WIDE = {"num_experts": cases.E, "hidden_classes": (4, 6), "activation_clamp": 0.5}
VARIANTS = {
    "everything": ("topk", {**WIDE, "capacity_factor": 0.7}),
    "all experts": ("topk-plain", {"top_k": cases.E, "group_rows": 2, "load_balance_scope": "group"}),
    "windows": ("gshard", {"group_window": 4, "jitter": 0.1, "load_balance_scope": "sequence"}),
    "experts choose": ("expert_choice", {"group_rows": 2, "hidden_classes": (4, 6)}),
}
"""Case and options. `everything` reroutes, has zero-computation experts, two widths and a clamp. In all of them the experts see another
vector than the router, of another width where no zero-computation expert gives the token back."""
EVERY = [(t, v, True) for t in TRANSPORTS for v in VARIANTS]
EVERY += [(t, v, False) for t in TRANSPORTS if TRANSPORTS[t].dropless for v in ("everything", "windows")]
ALSO = {("einsum", "windows"), ("scatter", "all experts"), ("gather", "experts choose")}
"""Each transport has to do everything, and one more each time; the other pairs are for the soak."""
CASES = [c if c[1] == "everything" or (*c[:2],) in ALSO else pytest.param(*c, marks=pytest.mark.soak) for c in EVERY]


def troubles(p):
    """The shapes of trouble, all of one array shape so that one compilation serves them."""
    one, few = np.zeros_like(p.valid), np.zeros_like(p.valid)
    one[2, 5] = True
    few[0, :3] = few[3, 6:] = True
    yield "mixed", p
    yield "none valid", p._replace(valid=np.zeros_like(p.valid))
    yield "one valid", p._replace(valid=one)
    yield "fewer than experts", p._replace(valid=few)
    yield "all valid", p._replace(valid=np.ones_like(p.valid))
    yield "all to one expert", harness.all_to(p, 5)
    yield "all tie", p._replace(heads={name: np.zeros_like(w) for name, w in p.heads.items()})


def check_layer(p, mesh, moe, mode):
    """Outputs, sums and gradients; integers exactly; nothing for invalid tokens; exactly zero for experts nobody visits."""
    actual = harness.run(p, mesh, moe, mode)
    harness.same(actual, harness.expected(p, moe, mode))
    assert mode.capacity_factor is not None or moe.capacity_factor is None or actual.sums["dropped_capacity"] == 0
    assert not actual.y[~p.valid].any()
    for name in ("gate_up", "down"):
        assert not actual.gradients[name][actual.sums["load"][: moe.num_experts] == 0].any()
    return actual


@pytest.mark.parametrize(("name", "variant", "tight"), CASES)
def test_b13_matches_the_oracle(mesh_of, name, variant, tight):
    case, options = VARIANTS[variant]
    moe = cases.configure(case, transport=name, **options)
    mode = Mode(True, moe.capacity_factor if tight else None)
    layer.check(moe, context=T)
    p = harness.problem(moe, seed=1, latent=8 if moe.zero_experts else 6)
    for trouble, q in troubles(p):
        actual = check_layer(q, mesh_of(), moe, mode)
        assert trouble != "none valid" or not any(g.any() for g in actual.gradients.values())
        if trouble == "mixed":
            assert not tight or moe.zero_experts or actual.sums["dropped_capacity"] > 0 or case == "expert_choice"


def test_soft_matches_the_oracle(mesh_of):
    """Its own carrier: two widths, a clamp, groups of two rows, and experts that see a vector of another width than the router."""
    moe = cases.configure("soft", **WIDE, group_rows=2)
    p = harness.problem(moe, seed=1, latent=6)
    for _, q in troubles(p):
        check_layer(q, mesh_of(), moe, Mode(True, None))


@pytest.mark.parametrize(
    "kernel", [pytest.param(k, marks=[pytest.mark.soak] * (k != "reference")) for k in sorted(BACKENDS)]
)
def test_widths_and_clamp_with_every_kernel(mesh_of, kernel):
    """Rows of two widths, and a clamp that binds, through the grouped matmuls of every backend that runs here."""
    moe = cases.configure("dense", **WIDE, kernel=kernel)
    p, mode = harness.problem(moe, seed=1), Mode(True, moe.capacity_factor)
    actual = check_layer(p, mesh_of(), moe, mode)
    free = harness.expected(p, dataclasses.replace(moe, activation_clamp=None), mode)
    assert np.abs(actual.y - free.y).max() > 0.1


@pytest.mark.soak
@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("name", TRANSPORTS)
def test_every_router_through_every_transport(mesh_of, name, router):
    moe = cases.configure(cases.first(router), transport="einsum" if ROUTERS[router].soft else name)
    p, has = harness.problem(moe, seed=1), ROUTERS[router].heads(moe)
    for _, q in troubles(p) if "logits" in has else [("mixed", p)]:
        check_layer(q, mesh_of(), moe, Mode(True, moe.capacity_factor))
