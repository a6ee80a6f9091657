"""Experts with biases and another activation: every transport on every kind of cut mesh as the sorted path on one device, which
tests/contracts/test_grouped_mlp.py holds to NumPy."""

import functools

import cases
import harness
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax import sharding
from moejax.kernels.grouped_mlp import Weights
from moejax.moe import experts, inputs, layer, noise
from moejax.moe.transport import TRANSPORTS

pytestmark = pytest.mark.usefixtures("strict_dtypes")

B, T, D, F, E = 8, 16, 6, 4, 8
CUT = [
    {"data": 2, "fsdp": 2, "expert": 2},
    {"expert": 2, "tensor": 2, "context": 2},
    {"expert": 2, "tensor": 2, "context": 2, "layout": "experts"},
]


def configured(transport, layout="hidden"):
    return cases.configure(
        "topk", transport=transport, tensor=layout, num_experts=E, hidden=F, activation="gpt_oss", activation_clamp=1.0,
        expert_bias=True, capacity_factor=None,
    )  # fmt: skip


def outcome(mesh, moe):
    """y, and the gradients of sum(y * dy) by x, router and every parameter of the experts."""
    rng = np.random.default_rng(7)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    x, dy, router = draw(B, T, D), draw(B, T, D), draw(D, E)
    weights = Weights(**{name: draw(*shape) for name, shape in experts.shapes(moe, E, D, F).items()})
    valid = rng.random((B, T)) < 0.9
    dims = experts.dims(sharding.LAYOUTS[moe.tensor])

    def place(a, *names):
        return jax.device_put(a, jax.NamedSharding(mesh, sharding.spec(*names)))

    flags, ids = place(valid, "batch", None), place(np.zeros((B, T), np.int32), "batch", None)
    tokens = inputs.Tokens(flags, ids, place(np.arange(B, dtype=np.int32), "batch"), ids)
    own = Weights(**{name: place(w, *dims[name]) for name, w in weights._asdict().items()})
    vectors = ("batch", "position", None)

    def value(x, router, weights, dy):
        moment = inputs.Moment(noise.step_key(0, jnp.int32(0)), jnp.int32(0), jnp.int32(0))
        parameters = layer.Parameters({"logits": router}, (weights,))
        y = layer.sparse_layer(x, None, tokens, parameters, {}, moment, moe, inputs.Mode(True, None)).routed
        return jnp.sum(y * dy), y

    with jax.set_mesh(mesh):
        step = harness.jit(jax.value_and_grad(value, (0, 1, 2), has_aux=True))
        (_, y), slopes = step(place(x, *vectors), place(router), own, place(dy, *vectors))
    return jax.tree.map(np.asarray, (y, slopes))


@functools.cache
def wanted(mesh):
    return outcome(mesh, configured("gather"))


@pytest.mark.parametrize("sizes", [{}, *CUT], ids=str)
@pytest.mark.parametrize("name", TRANSPORTS)
def test_b13_biases_and_activations(mesh_of, name, sizes):
    """A bias after the second matmul counts once, however the width is cut; every gradient is the same."""
    on = mesh_of(**{axis: size for axis, size in sizes.items() if axis != "layout"})
    y, slopes = outcome(on, configured(name, sizes.get("layout", "hidden")))
    y_, slopes_ = wanted(mesh_of())
    assert all(np.abs(slope).max() > 0.1 for slope in slopes_[2])
    harness.close(y, y_, what="y")
    for part, a, b in zip(
        ("x", "router", *Weights._fields), jax.tree.leaves(slopes), jax.tree.leaves(slopes_), strict=True
    ):
        harness.close(a, b, 2e-5, part)
