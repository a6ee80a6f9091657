"""The vocabulary loss in chunks against NumPy float64, the objective and the metrics against numbers worked out by hand."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from train import small

from moejax import config
from moejax.train import guard, losses, metrics

V, D = 48, 12


@pytest.fixture(autouse=True)
def one_device(mesh_of):
    """Where logits lie is said in names of mesh axes."""
    with jax.set_mesh(mesh_of()):
        yield


def problem():
    rng = np.random.default_rng(0)
    hidden, unembedding = rng.normal(size=(3, 5, D)), rng.normal(size=(D, V)) * 3
    return hidden.astype(np.float32), unembedding.astype(np.float32), rng.integers(0, V, (3, 5)).astype(np.int32)


def nats_of(hidden, unembedding, targets, chunk):
    return losses.vocabulary_nats(jnp.asarray(hidden), jnp.asarray(unembedding), jnp.asarray(targets), chunk)


def reference(hidden, unembedding, targets, weight):
    """Nats in float64, and the gradients of sum(nats * weight)."""
    h, u = hidden.astype(np.float64), unembedding.astype(np.float64)
    logits = h @ u
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    hit = np.eye(V)[targets]
    slope = (p - hit) * weight[..., None]
    return -np.log((p * hit).sum(-1)), slope @ u.T, np.einsum("btd,btv->dv", h, slope)


@pytest.mark.parametrize("chunk", [V, V // 2, V // 8, 1])
def test_vocabulary_nats(chunk):
    """Values and both gradients equal float64 NumPy's, whatever the chunk."""
    hidden, unembedding, targets = problem()
    weight = np.random.default_rng(1).normal(size=targets.shape).astype(np.float32)

    def loss(hidden, unembedding):
        nats = nats_of(hidden, unembedding, targets, chunk)
        return jnp.sum(nats * weight), nats

    (_, nats), found = small.quick_jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(hidden, unembedding)
    small.close([nats, *found], list(reference(hidden, unembedding, targets, weight)))


def test_vocabulary_nats_of_large_logits():
    """Logits of a few thousand neither overflow nor lose the target's own."""
    hidden, unembedding, targets = problem()
    nats = nats_of(hidden * 500, unembedding, targets, V // 8)
    wanted = (hidden * 500).astype(np.float64) @ unembedding
    top = wanted.max(-1)
    wanted = (
        top
        + np.log(np.exp(wanted - top[..., None]).sum(-1))
        - np.take_along_axis(wanted, targets[..., None], -1)[..., 0]
    )
    small.close(nats, wanted)


def sizes(jaxpr):
    """Sizes of all arrays made anywhere in a jaxpr."""
    for equation in jaxpr.eqns:
        yield from (v.aval.size for v in equation.outvars)
        for value in jax.tree.leaves(equation.params, is_leaf=lambda v: hasattr(v, "eqns") or hasattr(v, "jaxpr")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from sizes(inner)


def test_no_full_logits():
    """With chunks no array of the forward or backward pass has the size of all logits; without them one has."""
    hidden, unembedding, targets = (np.concatenate([a] * 8) if a.shape[0] == 3 else a for a in problem())

    def largest(chunk):
        loss = lambda h, u: jnp.sum(nats_of(h, u, targets, chunk))  # noqa: E731
        return max(sizes(jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(hidden, unembedding).jaxpr))

    full = targets.size * V
    assert largest(V) >= full
    assert largest(V // 8) < full


def layer_sums(**changes):
    """Two layers of four experts; the first balanced, the second with all requests on expert 0."""
    sums = {
        "tokens": [8, 8], "requested": [16, 16], "routed": [15, 12], "rerouted": [1, 0], "dropped": [0, 4],
        "dropped_capacity": [0, 3], "dropped_width": [0, 1], "unserved": [0, 2],
        "requests": [[4, 4, 4, 4], [16, 0, 0, 0]], "load": [[4, 4, 4, 4], [12, 0, 0, 0]],
    }  # fmt: skip
    reals = {
        "probability": [[2, 2, 2, 2], [8, 0, 0, 0]], "squared_logsumexp": [16, 32], "squared_logit": [64, 512],
        "entropy": [8 * math.log(4), 0], "confidence": [2, 8], "margin": [4, 8],
    }  # fmt: skip
    stats = {k: np.asarray(v, np.int32) for k, v in sums.items()} | {
        k: np.asarray(v, np.float32) for k, v in reals.items()
    }
    return {name: jnp.asarray(value) for name, value in (stats | changes).items()}


def whole_sums():
    return {
        "nats": jnp.float32(80),
        "targets": jnp.int32(40),
        "layers": {"sparse": layer_sums()},
        "gradient_norm": jnp.float32(0.5),
        "guard": guard.init() | {"skipped": jnp.int32(3)},
    }


def model(**options):
    return config.Model(moe=config.MoE(num_experts=4, **{"load_balance": 0.1, "router_z": 0.01} | options))


WANTED = {"cross_entropy": 2.0, "load_balance": 2.5, "router_z": 3.0, "loss": 2 + 0.25 + 0.03}


def test_objective_by_hand():
    """Mean nats, plus coefficients times the balancers averaged over layers: 1 and 4 balance to 2.5, z is 2 and 4."""
    loss, parts = losses.objective(whole_sums(), {}, model())
    assert {name: float(value) for name, value in parts.items()} == pytest.approx(WANTED, rel=1e-6)
    assert float(loss) == float(parts["loss"])


def test_objective_weighs_each_layer_by_its_state():
    """Adaptive weights 3 and 0.5 on losses 1 and 4: 2.5 on average, times the coefficient. The parts stay as they are."""
    routing = {"sparse": {"load_balance_weight": jnp.asarray([3.0, 0.5])}}
    loss, parts = losses.objective(whole_sums(), routing, model(load_balance_overflow=0.1))
    assert float(loss) == pytest.approx(2 + 0.1 * (3 * 1 + 0.5 * 4) / 2 + 0.03, rel=1e-6)
    assert float(parts["load_balance"]) == 2.5


def test_kinds_of_layers_are_averaged_together():
    """Two layers of one kind and one of another: the mean of three."""
    sums = whole_sums()
    sums["layers"]["other"] = jax.tree.map(lambda x: x[:1], sums["layers"]["sparse"])
    _, parts = losses.objective(sums, {}, model())
    assert float(parts["load_balance"]) == pytest.approx((1 + 4 + 1) / 3, rel=1e-6)


def test_objective_reports_what_it_does_not_add():
    """A balancer with coefficient 0 is in the parts and not in the loss, even where it is infinite."""
    sums = whole_sums()
    sums["layers"]["sparse"] = layer_sums(squared_logsumexp=np.asarray([np.inf, 1], np.float32))
    loss, parts = losses.objective(sums, {}, model(load_balance=0.0, router_z=0.0))
    assert float(loss) == 2.0 and float(parts["load_balance"]) == 2.5 and float(parts["router_z"]) == math.inf


def test_dense_models_have_no_aux_loss():
    loss, parts = losses.objective(whole_sums() | {"layers": {}}, {}, model())
    assert float(loss) == 2.0 and set(parts) == {"loss", "cross_entropy"}


def test_metrics_of_routing_by_hand():
    """Means over layers; of loads, requests and the dead the worst layer and expert, or their number."""
    assert metrics.of_routing(whole_sums(), model().moe) == pytest.approx({
        "moe/requested": 32, "moe/requests_per_token": 2, "moe/drop_rate": 4 / 32, "moe/drop_rate_capacity": 3 / 32,
        "moe/drop_rate_width": 1 / 32, "moe/reroute_rate": 1 / 32, "moe/unserved": 2 / 16, "moe/load_max": 4.0,
        "moe/max_violation": 3.0, "moe/max_violation_mean": 1.5, "moe/gini": 0.375, "moe/dead": 3,
        "moe/entropy": math.log(4) / 2, "moe/confidence": 10 / 16, "moe/margin": 12 / 16, "moe/logit_rms": 3.0,
    })  # fmt: skip


def test_metrics_of_zero_experts_and_replays():
    """Their share of the load; violations are of the targets; requests that a replay decided otherwise."""
    chosen = config.MoE(num_experts=3, zero_experts=("zero",), zero_share=0.625)
    load = np.array([[4, 4, 4, 20], [2, 2, 2, 10]], np.int32)
    sums = whole_sums()
    sums["layers"]["sparse"] = layer_sums(load=load, requests=load, mismatched=np.array([3, 0], np.int32))
    found = metrics.of_routing(sums, chosen)
    assert found["moe/zero_share"] == 0.625 and found["moe/mismatched"] == 3
    assert found["moe/max_violation"] == pytest.approx(0, abs=1e-6) and found["moe/load_max"] == pytest.approx(1)


def test_metrics_of_the_state():
    """Root mean square of biases over layers and experts, mean of adaptive weights; what is no bias or weight has no number."""
    state = {
        "sign_bias": np.array([[3.0, 0], [0, 4]]),
        "load_balance_weight": np.array([2.0, 4]),
        "last_fed": np.zeros((2, 2)),
    }
    assert metrics.of_state({"sparse": state}) == {"moe/sign_bias_rms": 2.5, "moe/load_balance_weight": 3.0}
    assert metrics.of_state({}) == {}


def test_metrics_of_training_by_hand():
    """The parts that the step returns, as they are: nothing is worked out again."""
    sums = whole_sums() | {"parts": {name: np.float32(value) for name, value in WANTED.items()}}
    numbers = metrics.of_training(sums, model().moe)
    wanted = {f"train/{name}": value for name, value in WANTED.items()}
    wanted |= {
        "train/bits_per_byte": 2 / math.log(2),
        "train/targets": 40,
        "train/gradient_norm": 0.5,
        "train/skipped_steps": 3,
    }
    assert {name: v for name, v in numbers.items() if name.startswith("train/")} == pytest.approx(wanted, rel=1e-6)
    assert numbers["moe/dead"] == 3


def test_metrics_of_evaluation_by_hand():
    """By label, and a label without targets is left out."""
    sums = whole_sums() | {"label_nats": np.array([60.0, 20.0, 0.0]), "label_targets": np.array([30, 10, 0])}
    numbers = metrics.of_evaluation(sums, model().moe, ("code", "prose", "none"), "eval")
    assert numbers["eval/loss"] == 2.0 and numbers["eval/targets"] == 40 and numbers["eval/moe/dead"] == 3
    assert numbers["eval/bits_per_byte/code"] == numbers["eval/bits_per_byte/prose"] == pytest.approx(2 / math.log(2))
    assert "eval/bits_per_byte/none" not in numbers


def test_metrics_add_is_exact():
    """Sums of a long evaluation pass 2^24 and 2^31 without losing one."""
    total = metrics.add(None, {"nats": np.array(2**24, np.float32), "targets": np.array(2**31 - 1, np.int32)})
    total = metrics.add(total, {"nats": np.array(1, np.float32), "targets": np.array(1, np.int32)})
    assert total["nats"] == 2**24 + 1 and total["targets"] == 2**31
