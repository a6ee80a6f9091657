"""Every balancer's loss: its value against the oracle, and that a coefficient is linear (B8)."""

import dataclasses

import harness
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from contracts import balanced

from moejax import config, sharding
from moejax.moe import balancers, inputs, layer, noise
from moejax.moe.balancers import BALANCERS

pytestmark = pytest.mark.usefixtures("strict_dtypes")

OFF = {"load_balance": 0.0, "router_z": 0.0}
FEW = {"num_experts": 5, "top_k": 2, "zero_experts": ("identity",), "zero_share": 0.3}
NOISY = {"router": "noisy_topk", "num_experts": 5, "top_k": 2}


# ---- values: a new balancer joins by a line in LOSSES, or in WITHOUT_LOSS with a test of what it does -----------------


def load_balance(moe, logits, valid, routing, spec, sums):
    parts = {"group": oracle.groups, "sequence": lambda shape, spec: oracle.sequences(shape)}
    whole = lambda shape, spec: [list(np.ndindex(shape))]  # noqa: E731
    cut = parts.get(moe.load_balance_scope, whole)(valid.shape, spec)
    return oracle.load_balance_parts(logits, valid, routing, spec, cut)


def score_variance(moe, logits, valid, routing, spec, sums):
    """Minus the mean over experts of the variance over tokens."""
    return -np.mean([np.var(routing.distribution[valid][:, e]) for e in range(spec.columns)])


def sparsity(moe, logits, valid, routing, spec, sums):
    """sum_e (X / mean_k) load_e * (mean over tokens of the gate)."""
    gates = np.maximum(logits[valid], 0)
    return sum(spec.columns / moe.mean_k * np.mean(g > 0) * np.mean(g) for g in gates.T)


LOSSES = {
    "load_balance": load_balance,
    "router_z": lambda moe, logits, valid, routing, spec, sums: oracle.router_z(sums),
    "importance": lambda moe, logits, valid, routing, spec, sums: oracle.importance(sums, spec),
    "smooth_load": lambda moe, logits, valid, routing, spec, sums: oracle.load(sums, spec),
    "score_variance": score_variance,
    "sparsity": sparsity,
}
WITHOUT_LOSS = {
    "sign_bias": "test_balancer_state",
    "quantile_bias": "test_balancer_state",
    "sinkhorn": "test_balancer_state",
    "orthogonality": "test_orthogonality",
}
CASES = {
    "load_balance": {},
    "load_balance global": FEW,
    "load_balance group": {**FEW, "load_balance_scope": "group", "group_rows": 2},
    "load_balance sequence": {**FEW, "load_balance_scope": "sequence", "group_rows": 2},
    "load_balance group window": {"load_balance_scope": "group", "group_window": 3},
    "load_balance sequence window": {"load_balance_scope": "sequence", "group_window": 3, "top_k": 3},
    "load_balance sequence top_p": {"load_balance_scope": "sequence", "router": "top_p"},
    "router_z": {},
    "importance": {"importance": 0.5, **FEW},
    "smooth_load": {"smooth_load": 0.5, **NOISY},
    "smooth_load of all": {"smooth_load": 0.5, **NOISY, "top_k": 5},
    "score_variance": {"score_variance": 0.5, "score": "sigmoid", **FEW},
    "sparsity": {"sparsity": 0.5, "router": "relu", "mean_k": 1.5, **FEW},
}


def test_every_balancer_has_a_case():
    assert set(LOSSES) | set(WITHOUT_LOSS) == set(BALANCERS)
    assert set(LOSSES) == {case.split()[0] for case in CASES}
    assert set(LOSSES) | {"orthogonality"} == {name for name, b in BALANCERS.items() if b.loss is not None}


@pytest.mark.parametrize("case", CASES)
def test_every_loss_equals_its_oracle(case):
    """On tokens of which some are invalid and one row all, and on none at all."""
    name = case.split()[0]
    moe = config.MoE(**{"num_experts": 4, "top_k": 2} | CASES[case])
    balancers.check(moe)
    problem = balanced.problem(moe)
    sums = balanced.of(moe).sums(*problem)
    spec, routing, wanted = balanced.expected(moe, *problem)
    logits, valid = np.asarray(problem[0], np.float64), problem[1]
    harness.close(sums["requests"], wanted["requests"])
    loss = BALANCERS[name].loss
    assert loss is not None
    harness.close(loss(sums, moe), LOSSES[name](moe, logits, valid, routing, spec, wanted))
    assert float(loss(jax.tree.map(jnp.zeros_like, sums), moe)) == 0


def test_microbatch_scope_is_the_loss_of_a_microbatch():
    """Its sums carry their own loss, layer by layer; a layer that nothing asks for is no part."""
    moe = config.MoE(num_experts=4, top_k=2, load_balance_scope="microbatch")
    problem = balanced.problem(moe)
    sums = balanced.of(moe).sums(*problem)
    plain = load_balance(moe, *problem[:2], *balanced.expected(moe, *problem)[1::-1], None)
    layers = jax.tree.map(lambda s: jnp.stack([s, jnp.zeros_like(s)]), sums)
    found = balancers.over_microbatch(layers, moe)
    harness.close(found["part_balance"], [plain, 0])
    assert found["parts"].tolist() == [1, 0]
    added = jax.tree.map(lambda s: s[0] + s[0] + s[1], found)
    harness.close(BALANCERS["load_balance"].loss(added, moe), plain)


def test_orthogonality():
    """Mean squared cosine over pairs of kept choices, against plain loops; a vector of zeros is in no pair."""
    rng = np.random.default_rng(0)
    outputs = rng.normal(size=(2, 5, 3, 4)).astype(np.float32)
    kept = rng.random((2, 5, 3)) < 0.7
    outputs[0, 0], kept[0, 0] = 0, True
    cosines = []
    for g, s in np.ndindex(2, 5):
        chosen = [v.astype(np.float64) for v, k in zip(outputs[g, s], kept[g, s], strict=True) if k and v.any()]
        for i, v in enumerate(chosen):
            cosines += [(v @ w) ** 2 / (v @ v) / (w @ w) for w in chosen[:i]]

    def run(x):
        sums, back = jax.vjp(lambda x: balancers.cosine_sums(x, jnp.asarray(kept)), x)
        return sums, back({"squared_cosine": jnp.float32(1), "pairs": np.zeros((), jax.dtypes.float0)})[0]

    sums, slope = harness.jit(run)(outputs)
    assert int(sums["pairs"]) == len(cosines) > 3
    harness.close(BALANCERS["orthogonality"].loss(sums, config.MoE()), np.mean(cosines))
    assert np.isfinite(slope).all() and np.abs(slope[0, 0]).max() == 0


@pytest.mark.parametrize("transport", ["einsum", "scatter", "gather"])
def test_orthogonality_of_a_layer(mesh_of, transport):
    """The layer's sums are those of the outputs of each token's kept experts, one by one, ungated."""
    moe = config.MoE(num_experts=4, top_k=3, hidden=3, transport=transport, capacity_factor=0.75, orthogonality=0.1)
    rng, mesh = np.random.default_rng(0), mesh_of()
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    x, router, up, down = draw(2, 6, 4), draw(4, 4), draw(4, 4, 2, 3), draw(4, 3, 4)
    valid, ids = rng.random((2, 6)) < 0.8, np.zeros((2, 6), np.int32)
    mode = inputs.Mode(True, moe.capacity_factor, record=True)

    def run(x, valid, ids, rows, router, up, down):
        tokens = inputs.Tokens(valid, ids, rows, ids)
        moment = inputs.Moment(noise.step_key(0, jnp.int32(0)), jnp.int32(0), jnp.int32(0))
        parameters = layer.Parameters({"logits": router}, (harness.parted(up, down),))
        result = layer.sparse_layer(x, None, tokens, parameters, {}, moment, moe, mode)
        return result.sums, result.recorded

    names = [("batch", None, None), ("batch", None), ("batch", None), ("batch",), ()]
    names += [("expert", "expert_storage", None, "expert_hidden"), ("expert", "expert_hidden_storage", None)]
    arrays = (x, valid, ids, np.arange(2, dtype=np.int32), router, up, down)
    placed = [jax.device_put(a, jax.NamedSharding(mesh, sharding.spec(*n))) for a, n in zip(arrays, names, strict=True)]
    with jax.set_mesh(mesh):
        sums, recorded = jax.tree.map(np.asarray, harness.jit(run)(*placed))
    cosines = []
    for b, t in np.argwhere(valid):
        here = (recorded.token[b] == t) & (recorded.slot[b] != np.iinfo(np.int32).max)
        outputs = [oracle.expert(*(np.float64(a) for a in (x[b, t], up[e], down[e]))) for e in recorded.expert[b][here]]
        for i, v in enumerate(outputs):
            cosines += [(v @ w) ** 2 / (v @ v) / (w @ w) for w in outputs[:i]]
    assert int(sums["pairs"][0]) == len(cosines) < 3 * valid.sum(), "some are dropped"
    harness.close(sums["squared_cosine"][0], sum(cosines), 2e-5)


# ---- B8 ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [case for case in CASES if " " not in case])
def test_b08_a_coefficient_is_linear(case):
    """Twice the coefficient, twice the gradient on logits and noise's size; none, exactly none. An adaptive weight is a factor."""
    name = case.split()[0]
    moe = config.MoE(**{"num_experts": 4, "top_k": 2} | OFF | CASES[case] | {name: 0.3})
    problem, weight = balanced.problem(moe), BALANCERS[name].weight

    def slope(coefficient, factor=1.0):
        now = dataclasses.replace(moe, **{name: coefficient})
        state = {} if weight is None else {weight: jnp.full(1, factor, jnp.float32)}

        objective = lambda sums: balanced.objective(jax.tree.map(lambda s: s[None], sums), now, state)[0]  # noqa: E731
        return balanced.of(moe).slope(objective, *problem)

    one = slope(0.25)
    assert all(np.isfinite(x).all() and np.abs(x).max() > 1e-6 for x in (one if name == "smooth_load" else one[:1]))
    for a, b in zip(slope(0.5), one, strict=True):
        np.testing.assert_array_equal(a, 2 * b)
    assert not any(x.any() for x in slope(0.0))
    if weight is not None:
        for a, b in zip(slope(0.25, 4.0), one, strict=True):
            harness.close(a, 4 * b, 1e-6)


def test_b08_orthogonality_is_linear():
    """The same of the loss on outputs, whose gradient turns them away from each other."""
    outputs = np.random.default_rng(0).normal(size=(1, 4, 2, 3)).astype(np.float32)
    plain = config.MoE(num_experts=4)
    others = balanced.of(plain).sums(*balanced.problem(plain))

    def value(x, coefficient):
        sums = others | balancers.cosine_sums(x, jnp.ones((1, 4, 2), bool))
        moe = config.MoE(**OFF, num_experts=4, orthogonality=coefficient)
        return balanced.objective(jax.tree.map(lambda s: s[None], sums), moe)[0]

    slopes = harness.jit(lambda x: [jax.grad(value)(x, c) for c in (0.25, 0.5, 0.0)])
    one, two, none = (np.asarray(s) for s in slopes(outputs))
    assert np.abs(one).max() > 1e-3
    np.testing.assert_array_equal(two, 2 * one)
    assert not none.any()


def test_smooth_load_of_all_experts_has_a_gradient():
    """With as many choices as experts nobody competes: every chance is 1, and no derivative is NaN."""
    moe = config.MoE(**OFF, smooth_load=1.0, **NOISY | {"top_k": 5})
    problem = balanced.problem(moe)
    assert balanced.of(moe).sums(*problem)["expected_load"].tolist() == [problem[1].sum()] * 5
    slopes = balanced.of(moe).slope(lambda sums: jnp.sum(sums["expected_load"]), *problem)
    assert not any(np.any(s) for s in slopes)
