"""Every way through a layer of experts against NumPy float64, values and gradients: activations, biases, weights of rows (B13, B14)."""

import functools
import sys

import harness
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.errors import ConfigError
from moejax.kernels import activations, quantized
from moejax.kernels.activations import Activation
from moejax.kernels.gather_sum import gather_sum
from moejax.kernels.grouped_matmul import BACKENDS, Groups, backend, blocks
from moejax.kernels.grouped_mlp import Weights, grouped_mlp
from moejax.kernels.grouped_mlp import api as mlp_api

pytestmark = pytest.mark.usefixtures("strict_dtypes")

PLAIN = [name for name in BACKENDS if backend(name).platform is None]
TOKENS, D, F, R, E = 90, 4, 3, 150, 4
TOLERANCE = {"float32": 2e-5, "bfloat16": 4e-2}
LAYOUTS = {
    "mixed": [20, 0, 100, 3],
    "last only": [0, 0, 0, 60],
    "one hot": [R, 0, 0, 0],
    "none": [0, 0, 0, 0],
}
ACTIVATIONS = {
    "swiglu": Activation("swiglu"),
    "swiglu clamped": Activation("swiglu", 0.7),
    "geglu": Activation("geglu"),
    "gpt_oss": Activation("gpt_oss", 0.7),
    "relu": Activation("relu"),
    "relu2": Activation("relu2"),
}


def value_in_numpy(activation, gate, up):
    """Each activation as its paper writes it; the limit first."""
    if activation.limit is not None:
        gate, up = np.minimum(gate, activation.limit), np.clip(up, -activation.limit, activation.limit)
    sigmoid = lambda x: 1 / (1 + np.exp(-x))  # noqa: E731
    return {
        "swiglu": lambda: gate * sigmoid(gate) * up,
        "geglu": lambda: 0.5 * gate * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3))) * up,
        "gpt_oss": lambda: gate * sigmoid(1.702 * gate) * (up + 1),
        "relu": lambda: np.where(up > 0, up, 0),
        "relu2": lambda: np.where(up > 0, up, 0) ** 2,
    }[activation.kind]()


def slopes_in_numpy(activation, gate, up, da, step=1e-6):
    """By central differences in float64, which no formula of ours has touched."""

    def by(g, u):
        return value_in_numpy(activation, g, u)

    d_up = da * (by(gate, up + step) - by(gate, up - step)) / (2 * step)
    return None if gate is None else da * (by(gate + step, up) - by(gate - step, up)) / (2 * step), d_up


def layer_in_numpy(x, index, sizes, w, row_weight, dy, activation):
    """y [R, D] and every gradient, group by group."""
    x, dy, row_weight = (np.asarray(a, np.float64) for a in (x, dy, row_weight))
    w = {name: None if a is None else np.asarray(a, np.float64) for name, a in w._asdict().items()}
    d = {name: None if a is None else np.zeros_like(a) for name, a in w.items()}
    y, dx, d_weight = np.zeros((len(index), D)), np.zeros_like(x), np.zeros(len(index))
    bias = lambda name, g: 0 if w[name] is None else w[name][g]  # noqa: E731
    stops = np.cumsum(sizes)
    for g, rows in enumerate(slice(stop - size, stop) for size, stop in zip(sizes, stops, strict=True)):
        mine = x[index[rows]]
        gate = None if w["gate"] is None else mine @ w["gate"][g] + bias("gate_bias", g)
        up = mine @ w["up"][g] + bias("up_bias", g)
        a = value_in_numpy(activation, gate, up)
        out, d_out = a @ w["down"][g] + bias("down_bias", g), dy[rows] * row_weight[rows, None]
        y[rows], d_weight[rows] = out * row_weight[rows, None], (dy[rows] * out).sum(-1)
        d_gate, d_up = slopes_in_numpy(activation, gate, up, d_out @ w["down"][g].T)
        d["down"][g] = a.T @ d_out
        for name, slope in (("gate", d_gate), ("up", d_up)):
            if w[name] is not None:
                d[name][g] = mine.T @ slope
                np.add.at(dx, index[rows], slope @ w[name][g].T)
        for name, slope in (("gate_bias", d_gate), ("up_bias", d_up), ("down_bias", d_out)):
            if w[name] is not None:
                d[name][g] = slope.sum(0)
    return y, dx, Weights(**d), d_weight


@functools.cache
def layer(impl, activation, weighted, indexed, with_inverse):
    """Jitted (x, weights, row_weight, index, inverse, sizes, dy) -> y, gradients."""

    def value(x, weights, row_weight, index, inverse, sizes, dy):
        y = grouped_mlp(
            x, index if indexed else None, sizes, weights, row_weight if weighted else None, activation=activation,
            inverse=inverse if with_inverse else None, impl=impl,
        )  # fmt: skip
        live = jnp.arange(y.shape[0], dtype=jnp.int32)[:, None] < jnp.sum(sizes, dtype=jnp.int32)
        return jnp.sum(jnp.where(live, y.astype(jnp.float32) * dy, 0)), y

    return harness.jit(jax.value_and_grad(value, argnums=(0, 1, 2), has_aux=True))


def operands(activation, biases, dtype, seed=1):
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)  # noqa: E731
    gated = activation.gated
    w = Weights(draw(E, D, F), draw(E, F, D), draw(E, D, F) if gated else None)
    if biases:
        w = w._replace(up_bias=draw(E, F), down_bias=draw(E, D), gate_bias=draw(E, F) if gated else None)
    return draw(TOKENS, D), w, jnp.asarray(rng.random(R), jnp.float32), draw(R, D).astype(jnp.float32)


INDEX = np.random.default_rng(4).integers(0, TOKENS, R).astype(np.int32)


def inverse_of(index, live):
    """i32[TOKENS, K]: rows of each token among the first `live`, R where there are fewer than K."""
    rows = [np.flatnonzero(index[:live] == t) for t in range(TOKENS)]
    most = max(1, *(len(r) for r in (np.flatnonzero(index == t) for t in range(TOKENS))))
    return np.array([np.pad(r, (0, most - len(r)), constant_values=R) for r in rows], np.int32)


def compare(
    impl, activation, biases=False, dtype="float32", weighted=True, indexed=True, with_inverse=False, jitted=layer
):
    x, w, row_weight, dy = operands(activation, biases, dtype)
    count = R if indexed else TOKENS
    index = INDEX if indexed else np.arange(TOKENS, dtype=np.int32)
    for sizes in LAYOUTS.values():
        sizes = sizes if indexed else [min(s, TOKENS // 2) for s in sizes]
        live = sum(sizes)
        step = jitted(impl, activation, weighted, indexed, with_inverse)
        given = (
            x,
            w,
            row_weight[:count],
            jnp.asarray(index),
            jnp.asarray(inverse_of(INDEX, live)),
            jnp.asarray(sizes, jnp.int32),
        )
        ((_, y), slopes), ((_, again), slopes_again) = (step(*given, dy[:count]) for _ in range(2))
        twice = (y[:live], slopes), (again[:live], slopes_again)
        for a, b in zip(*map(jax.tree.leaves, twice), strict=True):
            np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))
        dx, dw, d_weight = slopes
        factors = row_weight[:count] if weighted else np.ones(count)
        y_, dx_, dw_, d_weight_ = layer_in_numpy(x, index, sizes, w, factors, dy[:count], activation)
        tolerance = TOLERANCE[dtype]
        harness.close(np.asarray(y, np.float64)[:live], y_[:live], tolerance, "y")
        harness.close(np.asarray(dx, np.float64), dx_, tolerance, "dx")
        for name in Weights._fields:
            a, b = getattr(dw, name), getattr(dw_, name)
            assert (a is None) == (b is None)
            if a is not None:
                harness.close(np.asarray(a, np.float64), b, tolerance, name)
                assert all(size or not np.any(a[g]) for g, size in enumerate(sizes)), f"{name} of an empty group"
        if weighted:
            harness.close(d_weight, d_weight_, tolerance, "row_weight")


@pytest.mark.parametrize("impl", PLAIN)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_experts_match_numpy(impl, name):
    """Every activation with biases and weights of rows, rows repeated and skipped by their index. Twice the same bits."""
    compare(impl, ACTIVATIONS[name], biases=True)


@pytest.mark.parametrize("impl", PLAIN)
def test_plain_forms(impl):
    """Without biases, without weights, rows as they lie; in bfloat16; with the inverse index, whose gradient of x is a gather."""
    compare(impl, activations.SWIGLU, weighted=False, indexed=False)
    compare(impl, activations.SWIGLU, dtype="bfloat16")
    compare(impl, activations.SWIGLU, with_inverse=True)


def test_blocks_of_several_sizes(monkeypatch):
    """Waves of every room, some with blocks of one group and some not full."""
    monkeypatch.setattr(blocks, "LADDER", (128, 16, 8, 2))
    monkeypatch.setattr(blocks, "TOGETHER", 3)
    assert blocks.block_sizes(R, E) == (16, 8, 2)
    compare("blocked", activations.SWIGLU, with_inverse=True, jitted=layer.__wrapped__)


@pytest.mark.parametrize("impl", sorted(set(BACKENDS) - set(PLAIN)))
def test_kernels_through_the_interface(monkeypatch, impl):
    """Interpreted, with every gradient: biases and weights of rows, one cut of the rows."""
    monkeypatch.setattr(sys.modules[__name__], "LAYOUTS", {"mixed": LAYOUTS["mixed"]})
    compare(impl, ACTIVATIONS["gpt_oss"], biases=True)


@pytest.mark.parametrize("impl", PLAIN)
def test_int8_experts(impl):
    """The layer with int8 weights is the layer with the weights they stand for; those are within half a step of what was quantised.
    The gradient of x is too, and the frozen weights have none."""
    x, w, row_weight, dy = operands(activations.SWIGLU, True, "float32")
    own = w._replace(**{name: quantized.int8(getattr(w, name)) for name in ("gate", "up", "down")})
    for name in ("gate", "up", "down"):
        q, exact = getattr(own, name), np.asarray(getattr(w, name))
        assert q.values.dtype == jnp.int8
        np.testing.assert_allclose(quantized.whole(q, jnp.float32), exact, rtol=0, atol=float(q.scale.max()) * 0.501)
    meant = w._replace(**{name: quantized.whole(getattr(own, name), jnp.float32) for name in ("gate", "up", "down")})
    sizes = jnp.asarray(LAYOUTS["mixed"], jnp.int32)
    live = jnp.arange(R, dtype=jnp.int32)[:, None] < jnp.sum(sizes, dtype=jnp.int32)

    def value(x, row_weight, weights):
        y = grouped_mlp(x, jnp.asarray(INDEX), sizes, weights, row_weight, impl=impl)
        return jnp.sum(jnp.where(live, y * dy, 0)), jnp.where(live, y, 0)

    step = harness.jit(jax.value_and_grad(value, (0, 1), has_aux=True))
    for a, b in zip(
        jax.tree.leaves(step(x, row_weight, own)), jax.tree.leaves(step(x, row_weight, meant)), strict=True
    ):
        harness.close(a, b)
    slopes = jax.grad(lambda w: value(x, row_weight, w)[0], allow_int=True)(own)
    assert not np.any(slopes.up.scale) and slopes.up.values.dtype == jax.dtypes.float0
    assert np.any(slopes.up_bias)


def test_what_the_backward_pass_keeps():
    """x and the pre-activations; not the gathered rows, the activated ones or the output."""
    x, w, row_weight, dy = operands(activations.SWIGLU, False, "float32")
    sizes = jnp.asarray(LAYOUTS["mixed"], jnp.int32)
    for impl in PLAIN:
        _, kept = mlp_api._forward(x, jnp.asarray(INDEX), None, Groups(sizes), w, row_weight, activations.SWIGLU, impl)
        shapes = [a.shape for a in jax.tree.leaves(kept)]
        assert shapes.count((TOKENS, D)) == 1 and (R, D) not in shapes
        assert sum(s[1] for s in shapes if len(s) == 2 and s[0] >= R) == 2 * F


@pytest.mark.parametrize("impl", PLAIN)
def test_b14_poisoned_rows(impl):
    """Rows that no group owns point at NaN, weigh NaN and get NaN as cotangent: nothing else changes by a bit."""
    x, w, row_weight, dy = operands(activations.SWIGLU, True, "float32")
    sizes = LAYOUTS["mixed"]
    live, clean = sum(sizes), np.minimum(INDEX, TOKENS - 2)
    step = layer(impl, activations.SWIGLU, True, True, False)

    def run(x, index, row_weight, dy):
        (_, y), gradients = step(
            x, w, row_weight, jnp.asarray(index), jnp.zeros((TOKENS, 1), jnp.int32), jnp.asarray(sizes, jnp.int32), dy
        )
        return y[:live], jax.tree.map(lambda a: a, gradients)

    poisoned = clean.copy()
    poisoned[live:] = TOKENS - 1
    nan = jnp.nan
    y, (dx, dw, d_weight) = run(x, clean, row_weight, dy.at[live:].set(0))
    y_, (dx_, dw_, d_weight_) = run(x.at[-1].set(nan), poisoned, row_weight.at[live:].set(nan), dy.at[live:].set(nan))
    for a, b in zip(jax.tree.leaves((y, dx, dw, d_weight)), jax.tree.leaves((y_, dx_, dw_, d_weight_)), strict=True):
        assert np.isfinite(b).all()
        np.testing.assert_array_equal(a, b)


def test_gather_sum_is_a_weighted_sum():
    """Against NumPy, with gradients; an index past the end adds nothing even with a weight of NaN."""
    rng = np.random.default_rng(0)
    rows, dy = rng.normal(size=(7, D)).astype(np.float32), rng.normal(size=(4, D)).astype(np.float32)
    index, weights = np.array([[0, 5], [7, 2], [9, 7], [1, 6]], np.int32), rng.random((4, 2)).astype(np.float32)
    there = index < 7
    weights[~there] = np.nan

    def value(rows, weights):
        return jnp.sum(gather_sum(rows, jnp.asarray(index), weights) * dy)

    taken = np.where(there[..., None], rows[np.minimum(index, 6)], 0)
    factor = np.where(there, weights, 0)
    given = jnp.asarray(rows), jnp.asarray(index), jnp.asarray(weights)
    harness.close(gather_sum(*given), (taken * factor[..., None]).sum(1))
    harness.close(gather_sum(*given[:2]), taken.sum(1))
    d_rows, d_weights = jax.grad(value, (0, 1))(given[0], given[2])
    wanted = np.zeros_like(rows)
    for n, k in np.argwhere(there):
        wanted[index[n, k]] = factor[n, k] * dy[n]
    harness.close(d_rows, wanted)
    harness.close(d_weights, np.where(there, (taken * dy[:, None]).sum(-1), 0))


def test_refusals():
    x, w, _, _ = operands(activations.SWIGLU, False, "float32")
    sizes = jnp.zeros(E, jnp.int32)
    with pytest.raises(ValueError, match="relu with gated=False"):
        grouped_mlp(x, None, sizes, w, activation=Activation("relu"))
    with pytest.raises(ConfigError, match="activation='gelu': choose one of swiglu"):
        activations.check(Activation("gelu"))
    with pytest.raises(ConfigError, match="only gated activations are limited"):
        activations.check(Activation("relu", 7.0))
