"""The sparse layer and the oracle on the same problem: how the batteries of contracts/ and mesh/ call both."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import oracle
from jax.experimental import multihost_utils
from width_classes import joined, padded, parted

from moejax import sharding
from moejax.kernels.grouped_mlp import Weights
from moejax.moe import balancers, experts, inputs, layer, noise, zero_experts
from moejax.moe.places import ORDERS
from moejax.moe.records import columns
from moejax.moe.routers import ROUTERS
from moejax.moe.transport import TRAFFIC, TRANSPORTS
from moejax.moe.widths import of_classes

QUICK = {"xla_backend_optimization_level": 0}
if jax.__version_info__ < (0, 11):
    QUICK["xla_cpu_use_fusion_emitters"] = False  # the older emitters compile three times as fast; later they are gone
jit = functools.partial(jax.jit, compiler_options=QUICK)
"""jax.jit without LLVM's optimisations: compile time is the cost of these tests. The program stays the same."""

LAYER, STEP = 1, 2
LOSSES = {"load_balance": "load_balance", "router_z": "router_z", "importance": "importance", "smooth_load": "load"}
"""Balancers' losses that the oracle has too, and its names of them."""
COEFFICIENTS = (0.5, 0.25, 0.75, 0.6)
"""Of LOSSES in the differentiated value: large, so that an error in them shows."""
TASK = (0.0, 0.0, 0.0, 0.0)


class Problem(NamedTuple):
    """One input of the layer. x and the heads lie on a coarse grid, so that fp32 logits are exact and ties occur."""

    x: np.ndarray
    z: np.ndarray | None
    """What the experts see; x where it is None."""
    heads: dict[str, np.ndarray]
    experts: tuple[tuple[np.ndarray, np.ndarray], ...]
    """(gate_up, down) of each class of widths."""
    constants: np.ndarray | None
    valid: np.ndarray
    ids: np.ndarray
    row_ids: np.ndarray
    state: dict[str, np.ndarray]
    dy: np.ndarray


class Outcome(NamedTuple):
    value: np.ndarray
    y: np.ndarray
    """Of the routed experts and the zero-computation ones together."""
    sums: dict[str, np.ndarray]
    gradients: dict[str, np.ndarray]
    traffic: dict[str, np.ndarray] = {}
    """What the exchange took; the oracle has none, and meshes differ."""


def f32(a):
    return np.asarray(a, np.float32)


def problem(moe, seed=0, rows=4, positions=8, width=8, latent=None) -> Problem:
    """Four tokens of five are valid. Biases are dyadic, so that their sums are exact; with `latent`, z is not x."""
    rng = np.random.default_rng(seed)
    x = f32(rng.integers(-12, 13, (rows, positions, width)) / 8)
    heads = {n: f32(rng.integers(-8, 9, (width, c)) / 8) for n, c in ROUTERS[moe.router].heads(moe).items()}
    if moe.router_bias:
        heads["logits_bias"] = f32(rng.integers(-8, 9, heads["logits"].shape[1]) / 8)
    if "spread" in heads:  # noise of a size near that of logits: losses divide by it
        heads["spread"] /= 8
    inner, each = latent or width, moe.num_experts // len(of_classes(moe))
    experts = tuple(
        (f32(rng.normal(size=(each, inner, 2, f))), f32(rng.normal(size=(each, f, inner)))) for f in of_classes(moe)
    )
    number = zero_experts.constants(moe)
    return Problem(
        x=x,
        z=f32(rng.normal(size=(rows, positions, latent))) if latent else None,
        heads=heads,
        experts=experts,
        constants=f32(rng.normal(size=(number, width))) if number else None,
        valid=rng.random((rows, positions)) < 0.8,
        ids=rng.integers(0, 2**31, (rows, positions)).astype(np.int32),
        row_ids=np.arange(rows, dtype=np.int32),
        state=state_of(moe, rng),
        dy=f32(rng.normal(size=(rows, positions, inner))),
    )


def state_of(moe, rng):
    """Biases of a few eighths, thresholds about a half: some are equal."""
    state = {name: f32(rng.integers(-2, 3, np.shape(v)) / 8) for name, v in balancers.init(moe).items()}
    state |= {name: np.ones_like(v) for name, v in state.items() if name.endswith("_weight")}
    keeper = ROUTERS[moe.router].keeper
    kept = {} if keeper is None else keeper.init(moe)
    return state | {name: f32(0.5 + rng.integers(-1, 2, v.shape) / 8) for name, v in kept.items()}


def all_to(p: Problem, expert: int) -> Problem:
    """The same problem with a router that sends every token to one expert first."""
    x, logits = p.x.copy(), p.heads["logits"] / 8
    x[..., 0] = 1
    logits[0, expert] = 4
    return p._replace(x=x, heads=p.heads | {"logits": logits})


# ---- the library --------------------------------------------------------------------------------------------------


def put(p: Problem, mesh, moe, coefficients=COEFFICIENTS, recorded=None):
    """The arguments of `value_of`, placed on the mesh; what is differentiated comes first."""

    def place(a, *names):
        return None if a is None else jax.device_put(a, jax.NamedSharding(mesh, sharding.spec(*names)))

    vectors = ("batch", "position", None)
    dims = experts.dims(sharding.LAYOUTS[moe.tensor])
    classes = [parted(*pair)._asdict() for pair in p.experts]
    weights = tuple(Weights(**{name: place(w, *dims[name]) for name, w in each.items()}) for each in classes)
    heads = {name: place(weight) for name, weight in p.heads.items()}
    valid, labels, ids = (place(a, "batch", None) for a in (p.valid, p.valid.astype(np.int32), p.ids))
    tokens = inputs.Tokens(valid, labels, place(p.row_ids, "batch"), ids)
    learned = place(p.x, *vectors), place(p.z, *vectors), layer.Parameters(heads, weights, place(p.constants))
    state = {name: place(v) for name, v in p.state.items()}
    recorded = jax.tree.map(lambda a: place(np.asarray(a), "batch"), recorded)
    return learned, tokens, state, place(p.dy, *vectors), jnp.asarray(coefficients, jnp.float32), recorded


def moment():
    return inputs.Moment(noise.step_key(0, jnp.int32(STEP)), jnp.int32(LAYER), jnp.int32(STEP))


def value_of(learned, tokens, state, dy, coefficients, recorded, moe, mode):
    """sum(y * dy) + coefficients . losses, and what the layer returns."""
    x, z, parameters = learned
    result = layer.sparse_layer(x, z, tokens, parameters, state, moment(), moe, mode, recorded)
    sums = {name: jnp.sum(s, axis=0, dtype=s.dtype) for name, s in result.sums.items()}
    y = result.routed if result.local is None else result.routed + result.local
    value = jnp.sum(y.astype(jnp.float32) * dy)
    on = {**balancers.active(moe), **{name: balancers.BALANCERS[name] for name in balancers.ALWAYS}}
    for name, c in zip(LOSSES, coefficients, strict=True):
        value = value + c * on[name].loss(sums, moe) if name in on else value
    return value, (y, sums, result.recorded)


_COMPILED = {}


def tables(moe):
    """The entries of the library's tables that a config reads: keys of what is compiled, so that a test may replace them."""
    return ROUTERS[moe.router], ORDERS[moe.order], TRANSPORTS[moe.transport], *balancers.BALANCERS.values()


def compiled(p: Problem, mesh, moe, mode, recorded=None, backward=True):
    """The layer, with its gradients unless told otherwise, compiled once per mesh, config and shapes."""
    shapes = tuple(a.shape for a in jax.tree.leaves(p))
    key = (mesh, moe, mode, tables(moe), shapes, p.x.dtype, recorded is None, backward)
    if key not in _COMPILED:
        step = functools.partial(value_of, moe=moe, mode=mode)
        step = jax.value_and_grad(step, has_aux=True) if backward else step
        with jax.set_mesh(mesh):
            _COMPILED[key] = jit(step).lower(*put(p, mesh, moe, recorded=recorded)).compile()
    return _COMPILED[key]


def forward(p: Problem, mesh, moe, mode, recorded=None):
    """(y, sums, recorded routing) of the layer alone, as NumPy."""
    step = compiled(p, mesh, moe, mode, recorded, backward=False)
    with jax.set_mesh(mesh):
        _, out = step(*put(p, mesh, moe, recorded=recorded))
    return jax.tree.map(np.asarray, out)


def fetched(x):
    """The whole of a global array on this host, whoever holds its pieces."""
    return np.asarray(x if x.is_fully_addressable else multihost_utils.process_allgather(x, tiled=True))


def run(p: Problem, mesh, moe, mode, coefficients=COEFFICIENTS, recorded=None):
    """The library's Outcome as NumPy, and the recorded routing where the mode records."""
    step = compiled(p, mesh, moe, mode, recorded)
    with jax.set_mesh(mesh):
        out = step(*put(p, mesh, moe, coefficients, recorded))
    (value, (y, sums, kept)), (dx, dz, d) = jax.tree.map(fetched, out)
    sums, traffic = ({n: s for n, s in sums.items() if (n in TRAFFIC) == moves} for moves in (False, True))
    gate_up, down = padded([joined(w) for w in d.experts])
    gradients = {"x": dx, "gate_up": gate_up, "down": down}
    others = {"z": dz, "router": d.router.get("logits"), "spread": d.router.get("spread"), "constant": d.constants}
    others |= {"router_bias": d.router.get("logits_bias")}
    gradients |= {name: g for name, g in others.items() if g is not None}
    outcome = Outcome(value, y, sums, gradients, traffic)
    return (outcome, kept) if mode.record else outcome


# ---- the oracle ---------------------------------------------------------------------------------------------------


def spec_of(moe, factor, step=STEP) -> oracle.Spec:
    """The oracle's view of a config."""
    now = None
    if moe.top_k_start is not None:
        now = min(moe.top_k, moe.top_k_start + (moe.top_k - moe.top_k_start) * step // moe.top_k_steps)
    return oracle.Spec(
        moe.num_experts, moe.top_k, moe.router, moe.score, moe.renormalize, moe.gate_scale, factor, moe.group_rows,
        moe.group_window, moe.zero_experts, moe.order, moe.reroute, moe.router_dropout, moe.router_groups,
        moe.router_groups_kept, moe.sinkhorn, moe.top_p, moe.hash_by, now, moe.soft_slots, moe.zero_share,
        moe.activation_clamp, moe.router_groups_best, moe.gate_at,
    )  # fmt: skip


def bias_of(state):
    """What of a layer's state is added to selection."""
    biases = [v for name, v in state.items() if name.endswith("_bias")]
    return sum(biases) if biases else None


def expected(p: Problem, moe, mode, coefficients=COEFFICIENTS) -> Outcome:
    """The oracle's, which is handed the noise."""

    def draw(use, *shape):
        return np.asarray(noise.uniform(moment().key, moment().layer, jnp.asarray(p.row_ids), use, *shape))

    positions, kind, spec = p.x.shape[1], ROUTERS[moe.router], spec_of(moe, mode.capacity_factor)
    draws = oracle.Draws()
    if kind.noise(moe) and (mode.training or kind.always_random):
        draws.router = draw("router", positions, kind.noise(moe))
    if mode.training and moe.router_dropout:
        draws.dropout = draw("dropout", positions, columns(moe))
    wiggle = 1 - moe.jitter + 2 * moe.jitter * draw("jitter", *p.x.shape[1:]) if mode.training and moe.jitter else None
    parts = {"group": oracle.groups(p.valid.shape, spec), "sequence": oracle.sequences(p.valid.shape)}
    on = {**balancers.active(moe), **{name: None for name in balancers.ALWAYS}}
    gate_up, down = padded(p.experts)
    more = {"ids": p.ids, "bias": bias_of(p.state), "threshold": p.state.get("threshold"), "layer": LAYER}
    more |= {"draws": draws, "spread": p.heads.get("spread"), "constant": p.constants}
    more |= {"parts": parts.get(moe.load_balance_scope), "z": p.z, "router_bias": p.heads.get("logits_bias")}
    return Outcome(
        *oracle.layer(
            p.x, p.valid, p.heads.get("logits"), gate_up, down, spec, wiggle=wiggle, dy=p.dy,
            coefficients={LOSSES[name]: c for name, c in zip(LOSSES, coefficients, strict=True) if name in on}, **more,
        )
    )  # fmt: skip


# ---- comparison ---------------------------------------------------------------------------------------------------


def close(actual, wanted, rtol=1e-5, what=""):
    """Equal up to rtol of the largest entry; exactly where integers are wanted."""
    actual, wanted = np.asarray(actual), np.asarray(wanted)
    if wanted.dtype.kind in "iub":
        np.testing.assert_array_equal(actual, wanted, err_msg=what)
    else:
        scale = max(np.abs(wanted).max(initial=0), 1e-30)
        np.testing.assert_allclose(actual / scale, wanted / scale, rtol=0, atol=rtol, err_msg=what)


RENAMED = {"smooth_load": "expected_load"}
"""Of a sum of the oracle in the library."""
OPTIONAL = {"importance", "smooth_load"}
"""Sums that are there only where a balancer reads them."""


def same_sums(sums, wanted, rtol=1e-5):
    """Every sum of the oracle's, those that a balancer alone reads where one does."""
    for name, value in wanted.items():
        key = RENAMED.get(name, name)
        if key in sums or name not in OPTIONAL:
            close(sums[key], value, rtol, name)
    assert sums["routed"] + sums["rerouted"] + sums["dropped"] == sums["requested"]


def same(actual: Outcome, wanted: Outcome, rtol=1e-5):
    """Sums, outputs and the gradient of everything learned."""
    same_sums(actual.sums, wanted.sums, rtol)
    close(actual.y, wanted.y, rtol, "y")
    assert set(actual.gradients) == set(wanted.gradients)
    for name, gradient in wanted.gradients.items():
        close(actual.gradients[name], gradient, rtol, f"gradient of {name}")
    close(actual.value, wanted.value, 10 * rtol, "value")
