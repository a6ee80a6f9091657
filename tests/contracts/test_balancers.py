"""Every balancer: what perfect balance and collapse read (B7), and that a coefficient is linear (B8)."""

import functools

import harness
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from moejax import config
from moejax.errors import ConfigError
from moejax.moe import assignment, balance, stats
from moejax.moe.balance import BALANCERS
from moejax.moe.layer import Mode
from moejax.moe.router import ROUTERS
from moejax.train import losses

pytestmark = pytest.mark.usefixtures("strict_dtypes")

E, N = 8, 64
ORACLE = {"load_balance": oracle.load_balance, "router_z": oracle.router_z}
"""A new balancer joins by one line here, and brings its oracle."""


@functools.cache
def sums_of(k):
    """Jitted logits [1,N,E] -> the sums of one layer, dropless and all valid."""
    moe = config.MoE(num_experts=E, top_k=k, renormalize=k > 1)

    def run(logits):
        valid = jnp.ones(logits.shape[:2], bool)
        choice = ROUTERS["softmax_topk"].choose(logits, None, moe)
        placed = assignment.place(choice, valid, jnp.full(1, N, jnp.int32), E)
        return stats.router_sums(logits, choice, placed, valid)

    return harness.jit(run)


def ranked(ranks):
    """Logits of tokens that choose ranks[i] in order: the first choice stands out most."""
    logits = np.zeros((1, N, E), np.float32)
    for i, choices in enumerate(ranks):
        for place, e in enumerate(choices):
            logits[0, i, e] = 3 + 0.25 * (len(choices) - place)
    return jnp.asarray(logits)


def balanced(k):
    """Token i chooses k experts from i on, round the clock: every expert is every choice equally often."""
    return [[(i + j) % E for j in range(k)] for i in range(N)]


def collapsed(k, which, to=0):
    """The same over the other experts, but one choice of every token is always expert `to`."""
    others = [e for e in range(E) if e != to]
    ranks = []
    for i in range(N):
        choices = [others[(i + j) % (E - 1)] for j in range(k)]
        choices[which] = to
        ranks.append(choices)
    return ranks


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_b07_perfect_balance_reads_one(k):
    """1.0 for every k; collapse of any one choice reads more."""
    sums = sums_of(k)(ranked(balanced(k)))
    assert sums["requests"].tolist() == [N * k // E] * E
    assert float(balance.load_balance(sums)) == pytest.approx(1, abs=1e-6)
    for which in range(k):
        sums = sums_of(k)(ranked(collapsed(k, which)))
        assert int(sums["requests"][0]) == N
        assert float(balance.load_balance(sums)) > 1.02, f"choice {which} of {k}"


def test_b07_uniform_probabilities_do_not_hide_a_dead_expert():
    """All logits equal send every token to expert 0, and P is uniform: the loss reads 1 by its formula, the load says 0."""
    sums = sums_of(1)(jnp.zeros((1, N, E), jnp.float32))
    assert sums["load"].tolist() == [N] + [0] * (E - 1)
    assert float(balance.load_balance(sums)) == pytest.approx(1, abs=1e-6)


def test_b07_opposite_layers_do_not_cancel():
    """Half the layers collapse on expert 0, half on expert 7: averaged as losses they stay high, as sums they would hide."""
    layers = [sums_of(1)(ranked(collapsed(1, 0, to))) for to in (0, 1, 2, 3, 4, 5, 6, 7)]
    stacked = jax.tree.map(lambda *s: jnp.stack(s), *layers)
    moe = config.MoE(num_experts=E, load_balance=1.0, router_z=0.0)
    sums = {"nats": jnp.float32(0), "targets": jnp.int32(1), "layers": {"sparse": stacked}}
    loss, parts = losses.objective(sums, moe)
    merged = jax.tree.map(lambda s: jnp.sum(s, axis=0, dtype=s.dtype), stacked)
    each = [float(balance.load_balance(s)) for s in layers]
    assert float(balance.load_balance(merged)) == pytest.approx(1, abs=1e-5)
    assert float(parts["load_balance"]) == pytest.approx(np.mean(each), rel=1e-6)
    assert min(each) > 1.5
    assert float(loss) == pytest.approx(np.mean(each), rel=1e-6)


def test_every_balancer_equals_its_oracle():
    """Values, of ordinary sums and of no tokens at all."""
    assert set(ORACLE) == set(BALANCERS)
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(1, N, E)).astype(np.float32)
    routing = oracle.route(logits.astype(np.float64), np.ones((1, N), bool), oracle.Spec(E, 2, "softmax_topk"))
    wanted = oracle.statistics(logits.astype(np.float64), np.ones((1, N), bool), routing)
    sums = sums_of(2)(jnp.asarray(logits))
    for name, balancer in BALANCERS.items():
        harness.close(balancer.loss(sums), ORACLE[name](wanted))
        assert float(balancer.loss(jax.tree.map(jnp.zeros_like, sums))) == 0


@pytest.mark.parametrize(("index", "name"), list(enumerate(ORACLE)))
def test_b08_a_coefficient_is_linear(mesh_of, index, name):
    """Through the whole layer with no task loss: twice the coefficient, twice the router's gradient; none, exactly none."""
    moe, mode = config.MoE(num_experts=E, hidden=4), Mode(True, None)
    p = harness.problem(seed=6)._replace(dy=np.zeros((4, 8, 8), np.float32))

    def gradient(coefficient):
        coefficients = [coefficient * (i == index) for i in range(2)]
        return harness.run(p, mesh_of(), moe, mode, coefficients)[3][1]

    one = gradient(0.3)
    assert np.abs(one).max() > 1e-3
    np.testing.assert_array_equal(gradient(0.6), 2 * one)
    harness.close(gradient(0.9), 3 * one, 1e-6)
    assert not gradient(0).any()


@pytest.mark.parametrize("name", BALANCERS)
def test_coefficients(name):
    """Each reads its own option, and a negative one is refused."""
    assert BALANCERS[name].coefficient(config.MoE(**{name: 0.375})) == 0.375
    with pytest.raises(ConfigError, match=f"model.moe.{name}=-1"):
        balance.check(config.MoE(**{name: -1.0}))
