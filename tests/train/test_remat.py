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

OPTIONS = {
    "model.repeats": 2, "model.moe.router": "gshard", "model.moe.transport": "scatter", "model.moe.capacity_factor": 1.0,
}  # fmt: skip


def gradients(policy, **options):
    """The gradient function of a config, its state and arguments for a batch."""
    cfg = small.configure(**OPTIONS | options | {"model.remat": policy})
    built, start = small.begin(cfg)

    def function(parameters, batch):
        return step.gradients(built, parameters, batch, noise.step_key(0, jnp.int32(0)))

    return built, start.parameters, function


@functools.cache
def compiled(policy):
    built, parameters, function = gradients(policy)
    with jax.set_mesh(built.mesh):
        lowered = jax.jit(function).lower(parameters, small.place(small.arrays(0), built.mesh))
        return built, parameters, lowered.compile(compiler_options=small.COMPILER)


def ties(parameters, host):
    """All rows and positions identical, all router weights zero: every logit ties."""
    same = {name: np.zeros_like(host[name]) + 7 for name in ("tokens", "targets")}
    same |= {"segments": np.ones_like(host["segments"]), "valid": np.ones_like(host["valid"])}
    flat = jax.tree_util.tree_map_with_path(
        lambda path, x: jnp.zeros_like(x) if "router" in jax.tree_util.keystr(path) else x, parameters
    )
    return flat, host | same


@pytest.mark.parametrize("policy", [name for name in remat.POLICIES if name != "none"])
@pytest.mark.parametrize("tied", [False, True], ids=["random", "all ties"])
def test_b10_remat_changes_no_bit(policy, tied):
    """B10: loss, gradients, counts are bit-equal to those without recomputation, with noise and drops, also when all ties."""
    results = []
    for name in ("none", policy):
        built, parameters, function = compiled(name)
        parameters, host = ties(parameters, small.arrays(0)) if tied else (parameters, small.arrays(0))
        results.append(small.on_host(function(parameters, small.place(host, built.mesh))))
    (wanted, sums), (actual, sums_) = results
    assert sums["layers"]["sparse"]["dropped"].sum() > 0
    if tied:
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


def traced(policy, **options):
    built, parameters, function = gradients(policy, **options)
    with jax.set_mesh(built.mesh):
        return list(equations(jax.make_jaxpr(function)(parameters, small.place(small.arrays(0), built.mesh)).jaxpr))


def decisions(policy):
    """How often a training step chooses experts, and counts places: choices in the forward pass and again in the backward."""
    names = [str(equation.primitive) for equation in traced(policy)]
    return names.count("top_k")


@pytest.mark.parametrize("policy", remat.POLICIES)
def test_b10_routing_is_decided_once(policy, monkeypatch):
    """B10: the backward pass has no top_k of its own; a policy that forgets the assignment has."""
    assert decisions(policy) == 1
    monkeypatch.setitem(remat.POLICIES, policy, jax.checkpoint_policies.nothing_saveable)
    assert decisions(policy) == 2


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
    floats = ("probability", "squared_logsumexp", "entropy", "margin")
    for name, value in sums["layers"]["sparse"].items():
        assert value.dtype == (jnp.float32 if name in floats else jnp.int32), name
    assert sums["nats"].dtype == jnp.float32 and sums["targets"].dtype == jnp.int32
