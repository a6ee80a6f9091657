"""What the backward pass makes again changes nothing, and precision is where it must be (B9, B10)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from train import small

from moejax.models import remat
from moejax.moe import noise
from moejax.train import step

OPTIONS = {"model.repeats": 2, "model.moe.transport": "scatter", "model.moe.capacity_factor": 1.0}
KINDS = {
    "gshard": {"model.moe.router": "gshard"},
    "noisy": {"model.moe.router": "noisy_topk", "model.moe.smooth_load": 0.1, "model.moe.orthogonality": 0.1},
    "biased": {
        "model.moe.router": "noisy_topk", "model.moe.sign_bias": 0.01, "model.moe.quantile_bias": 0.5, "model.moe.reroute": True,
        "model.moe.router_dropout": 0.1, "model.moe.importance": 0.1, "model.moe.load_balance_scope": "sequence",
        "model.moe.zero_experts": ("constant",),
    },
    "threshold": {
        "model.moe.router": "threshold", "model.moe.load_balance_overflow": 0.1, "model.moe.score_variance": 0.1,
        "model.moe.orthogonality": 0.1,
    },
    "relu": {"model.moe.router": "relu", "model.moe.sparsity": 0.1},
    "top_p": {"model.moe.router": "top_p"},
}  # fmt: skip
COMPILED = ["gshard", "biased", "threshold"]
"""Of which gradients are compared; of all is counted how often they decide. (The normal distribution of smooth_load rounds by what
it is fused with.)"""


def gradients(policy, kind="gshard", **options):
    """The gradient function of a config, its state with biases of a few hundredths, and arguments for a batch."""
    cfg = small.configure(**OPTIONS | KINDS[kind] | options | {"model.remat": policy})
    built, start = small.begin(cfg)
    rng = np.random.default_rng(0)
    kept = {
        name: x + np.float32(0.05 * rng.normal(size=x.shape)) if name.endswith(("_bias", "threshold")) else x
        for name, x in start.routing["sparse"].items()
    }

    def function(parameters, batch):
        at = step.Setting(noise.step_key(0, jnp.int32(0)), {"sparse": kept}, jnp.int32(0))
        return step.gradients(built, parameters, batch, at)[:2]

    return built, start.parameters, function


@functools.cache
def compiled(policy, kind):
    built, parameters, function = gradients(policy, kind)
    with jax.set_mesh(built.mesh), small.exact():
        lowered = small.quick_jit(function).lower(parameters, small.place(small.arrays(0), built.mesh))
        return built, parameters, lowered.compile()


def ties(parameters, host):
    """All rows and positions identical, all router weights zero: every logit ties."""
    same = {name: np.zeros_like(host[name]) + 7 for name in ("tokens", "targets")}
    same |= {"segments": np.ones_like(host["segments"]), "valid": np.ones_like(host["valid"])}
    flat = jax.tree_util.tree_map_with_path(
        lambda path, x: jnp.zeros_like(x) if "router" in jax.tree_util.keystr(path) else x, parameters
    )
    return flat, host | same


CASES = [
    pytest.param(policy, kind, marks=[] if policy == "full" and kind == "gshard" else pytest.mark.slow)
    for policy in ("selective", "exchanged", "full")
    for kind in COMPILED
    if policy != "exchanged" or kind == "gshard"
]


@pytest.mark.parametrize("policy,kind", CASES)
@pytest.mark.parametrize("tied", [False, True], ids=["random", "all ties"])
def test_b10_remat_changes_no_bit(policy, kind, tied):
    """B10: loss, gradients, counts are bit-equal to those without recomputation, with noise, drops, biases and thresholds, also
    when all ties."""
    results = []
    for name in ("none", policy):
        built, parameters, function = compiled(name, kind)
        parameters, host = ties(parameters, small.arrays(0)) if tied else (parameters, small.arrays(0))
        results.append(small.on_host(function(parameters, small.place(host, built.mesh))))
    (wanted, sums), (actual, sums_) = results
    layers = sums["layers"]["sparse"]
    assert layers["dropped"].sum() + layers["rerouted"].sum() > 0
    if tied and kind == "gshard":
        assert (sums["layers"]["sparse"]["requests"][:, 0] == small.B * small.T).all(), "ties go to the lower id"
    small.equal(sums_, sums)
    small.equal(actual, wanted)


def equations(jaxpr):
    """Every equation of a jaxpr and of those inside it."""
    for equation in jaxpr.eqns:
        yield equation
        for value in jax.tree.leaves(equation.params, is_leaf=lambda v: hasattr(v, "eqns") or hasattr(v, "jaxpr")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


def traced(policy, kind="gshard", **options):
    built, parameters, function = gradients(policy, kind, **options)
    with jax.set_mesh(built.mesh):
        return list(equations(jax.make_jaxpr(function)(parameters, small.place(small.arrays(0), built.mesh)).jaxpr))


def decisions(policy, kind):
    """How often a training step sorts experts: choices in the forward pass and again in the backward."""
    names = [str(equation.primitive) for equation in traced(policy, kind)]
    return names.count("top_k") + names.count("sort")


OFTEN = ("gshard", "noisy", "biased")


@pytest.mark.parametrize("kind", [pytest.param(k, marks=[] if k in OFTEN else pytest.mark.slow) for k in KINDS])
def test_b10_routing_is_decided_once(kind, monkeypatch):
    """B10: the backward pass has no top_k of its own, whatever is recomputed; with a policy that forgets the assignment it has."""
    once = decisions("none", kind)
    for policy in ("full", "selective", "exchanged") if kind == "gshard" else ("full",):
        assert decisions(policy, kind) == once
    monkeypatch.setitem(remat.POLICIES, "full", jax.checkpoint_policies.nothing_saveable)
    assert decisions("full", kind) > once


def test_b09_precision_of_the_whole_model():
    """B9: under bfloat16 compute the router's weight, logits and sums are fp32 and its dots HIGHEST, forward and backward;
    gradients are fp32, counts int32; other matmuls are bfloat16."""
    built, parameters, function = gradients("none", **{"model.compute_dtype": "bfloat16"})
    highest, lowest = 0, 0
    for equation in traced("none", **{"model.compute_dtype": "bfloat16"}):
        if str(equation.primitive) == "dot_general":
            kinds = {v.aval.dtype for v in equation.invars}
            shapes = [v.aval.shape for v in equation.invars] + [equation.outvars[0].aval.shape]
            if any(shape[-2:] in ((16, 8), (8, 16)) and len(shape) == 2 for shape in shapes):
                precision = equation.params["precision"]
                assert kinds == {jnp.dtype("float32")} and set(np.ravel(precision)) == {jax.lax.Precision.HIGHEST}, (
                    equation
                )
                highest += 1
            lowest += kinds == {jnp.dtype("bfloat16")}
        if str(equation.primitive) == "top_k":
            assert equation.invars[0].aval.dtype == jnp.float32
    assert highest >= 3 and lowest > 10
    with jax.set_mesh(built.mesh):
        slope, sums = jax.eval_shape(function, parameters, small.place(small.arrays(0), built.mesh))
    assert {x.dtype for x in jax.tree.leaves((parameters, slope))} == {jnp.dtype("float32")}
    floats = ("probability", "squared_logsumexp", "squared_logit", "entropy", "confidence", "margin")
    for name, value in sums["layers"]["sparse"].items():
        assert value.dtype == (jnp.float32 if name in floats else jnp.int32), name
    assert sums["nats"].dtype == jnp.float32 and sums["targets"].dtype == jnp.int32
