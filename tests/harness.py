"""The sparse layer and the oracle on the same problem: how the batteries of contracts/ and mesh/ call both."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import oracle

from moejax import sharding
from moejax.kernels.grouped_mlp import Weights
from moejax.moe import balance, layer, noise

jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
"""jax.jit without LLVM's optimisations: compile time is the cost of these tests. The program stays the same."""

LAYER = 1
STEP = 3
COEFFICIENTS = (0.5, 0.25)
"""Of load balance and router z in the differentiated value: large, so that an error in them shows."""


class Problem(NamedTuple):
    """One input of the layer. x and router lie on a coarse grid, so that fp32 logits are exact and ties occur."""

    x: np.ndarray
    valid: np.ndarray
    row_ids: np.ndarray
    router: np.ndarray
    gate_up: np.ndarray
    down: np.ndarray
    dy: np.ndarray


def problem(seed=0, rows=4, positions=8, width=8, experts=8, hidden=4) -> Problem:
    """Four tokens of five are valid."""
    rng = np.random.default_rng(seed)

    def f32(a):
        return np.asarray(a, np.float32)

    return Problem(
        x=f32(rng.integers(-12, 13, (rows, positions, width)) / 8),
        valid=rng.random((rows, positions)) < 0.8,
        row_ids=np.arange(rows, dtype=np.int32),
        router=f32(rng.integers(-8, 9, (width, experts)) / 8),
        gate_up=f32(rng.normal(size=(experts, width, 2, hidden))),
        down=f32(rng.normal(size=(experts, hidden, width))),
        dy=f32(rng.normal(size=(rows, positions, width))),
    )


def all_to(p: Problem, expert: int) -> Problem:
    """The same problem with a router that sends every token to one expert first."""
    x, router = p.x.copy(), p.router / 8
    x[..., 0] = 1
    router[0, expert] = 4
    return p._replace(x=x, router=router)


def spec_of(moe, factor) -> oracle.Spec:
    """The oracle's view of a config."""
    return oracle.Spec(
        moe.num_experts,
        moe.top_k,
        moe.router,
        moe.renormalize,
        moe.gate_scale,
        factor,
        moe.group_rows,
        moe.group_window,
    )


def put(p: Problem, mesh):
    """The problem as the layer's arguments, placed on the mesh."""

    def place(a, *names):
        return jax.device_put(a, jax.NamedSharding(mesh, sharding.spec(*names)))

    tokens = layer.Tokens(
        place(p.valid, "batch", None), place(p.valid.astype(np.int32), "batch", None), place(p.row_ids, "batch")
    )
    weights = Weights(
        place(p.gate_up, "expert", "expert_storage", None, "expert_hidden"),
        place(p.down, "expert", "expert_hidden_storage", None),
    )
    return (
        place(p.x, "batch", None, None),
        layer.Parameters(place(p.router), weights),
        tokens,
        place(p.dy, "batch", None, None),
    )


def _value(x, parameters, tokens, dy, coefficients, moe, mode):
    y, sums = layer.sparse_layer(x, tokens, parameters, noise.step_key(0, jnp.int32(STEP)), jnp.int32(LAYER), moe, mode)
    sums = {name: jnp.sum(s, axis=0, dtype=s.dtype) for name, s in sums.items()}
    aux = coefficients[0] * balance.load_balance(sums) + coefficients[1] * balance.router_z(sums)
    return jnp.sum(y.astype(jnp.float32) * dy) + aux, (y, sums)


_COMPILED = {}


def compiled(p: Problem, mesh, moe, mode):
    """The layer with its gradients, compiled once per mesh, config and shapes."""
    key = (mesh, moe, mode, tuple(a.shape for a in p), p.x.dtype)
    if key not in _COMPILED:
        step = jax.value_and_grad(functools.partial(_value, moe=moe, mode=mode), argnums=(0, 1), has_aux=True)
        with jax.set_mesh(mesh):
            _COMPILED[key] = jit(step).lower(*put(p, mesh), jnp.zeros(2, jnp.float32)).compile()
    return _COMPILED[key]


def forward(p: Problem, mesh, moe, mode):
    """The layer alone, compiled."""
    x, parameters, tokens, _ = put(p, mesh)
    key, depth = noise.step_key(0, jnp.int32(STEP)), jnp.int32(LAYER)
    with jax.set_mesh(mesh):
        step = jit(lambda x, tokens, parameters: layer.sparse_layer(x, tokens, parameters, key, depth, moe, mode))
        return step.lower(x, tokens, parameters).compile()


def run(p: Problem, mesh, moe, mode, coefficients=COEFFICIENTS):
    """(value, y, sums, (dx, d_router, d_gate_up, d_down)) of the library, as NumPy."""
    step = compiled(p, mesh, moe, mode)
    with jax.set_mesh(mesh):
        (value, (y, sums)), (dx, d) = step(*put(p, mesh), jnp.asarray(coefficients, jnp.float32))
    return jax.tree.map(np.asarray, (value, y, sums, (dx, d.router, d.experts.gate_up, d.experts.down)))


def expected(p: Problem, moe, mode, coefficients=COEFFICIENTS):
    """The same of the oracle, which is handed the noise."""

    def draw(use, *shape):
        return np.asarray(
            noise.uniform(noise.step_key(0, jnp.int32(STEP)), jnp.int32(LAYER), jnp.asarray(p.row_ids), use, *shape)
        )

    uniform = draw("router", p.x.shape[1]) if mode.training and moe.router == "gshard" else None
    wiggle = 1 - moe.jitter + 2 * moe.jitter * draw("jitter", *p.x.shape[1:]) if mode.training and moe.jitter else None
    return oracle.layer(
        p.x, p.valid, p.router, p.gate_up, p.down, spec_of(moe, mode.capacity_factor),
        uniform=uniform, wiggle=wiggle, dy=p.dy, coefficients=coefficients,
    )  # fmt: skip


def close(actual, wanted, rtol=1e-5, what=""):
    """Equal up to rtol of the largest entry; exactly where integers are wanted."""
    actual, wanted = np.asarray(actual), np.asarray(wanted)
    if wanted.dtype.kind in "iub":
        np.testing.assert_array_equal(actual, wanted, err_msg=what)
    else:
        scale = max(np.abs(wanted).max(initial=0), 1e-30)
        np.testing.assert_allclose(actual / scale, wanted / scale, rtol=0, atol=rtol, err_msg=what)


def same(actual, wanted, rtol=1e-5):
    """Every part of what `run` and `expected` return."""
    (value, y, sums, gradients), (value_, y_, sums_, gradients_) = actual, wanted
    for name in sums_:
        close(sums[name], sums_[name], rtol, name)
    close(y, y_, rtol, "y")
    for name, a, b in zip(("x", "router", "gate_up", "down"), gradients, gradients_, strict=True):
        close(a, b, rtol, f"gradient of {name}")
    close(value, value_, 10 * rtol, "value")
