"""Routing's numbers: fp32 and the highest precision whatever the compute type (B9), and noise that belongs to the row (B37)."""

import functools

import cases
import harness
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax import config
from moejax.moe import layer, noise, routers
from moejax.moe.inputs import Mode
from moejax.moe.routers import ROUTERS

pytestmark = pytest.mark.usefixtures("strict_dtypes")


def equations(jaxpr):
    """Every equation, also those of inner programs."""
    for equation in jaxpr.eqns:
        yield equation
        for parameter in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda p: hasattr(p, "eqns") or hasattr(p, "jaxpr")
        ):
            inner = getattr(parameter, "jaxpr", parameter)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


def test_b09_the_program_for_tpu_says_highest():
    """Lowered for TPU: every dot of the router, backward included, is fp32 at HIGHEST; a default one is a bf16 pass there."""
    x, w = jnp.ones((4, 8), jnp.bfloat16), jnp.ones((8, 3))
    step = jax.jit(jax.grad(lambda x, w: jnp.sum(jnp.square(routers.logits(x, w))), argnums=(0, 1)))
    dots = [d for d in step.trace(x, w).lower(lowering_platforms=("tpu",)).as_text().splitlines() if "dot_general" in d]
    assert len(dots) == 3
    assert all("[HIGHEST, HIGHEST]" in d and "bf16" not in d for d in dots)


WIDTH = 6
"""Of the tokens: no other dimension has it, so that a dot of the router is known by its shapes."""
SELECT = ("top_k", "sort", "argmax", "cumsum")
NARROW = ("exp", "log", "log1p", "logistic", "erf", "erf_inv")


@pytest.mark.parametrize("router", ROUTERS)
def test_b09_routing_is_fp32_under_bf16(mesh_of, router):
    """In the jaxpr, backward included: router dots take fp32 at HIGHEST, selection sees fp32, counts are int32."""
    moe = cases.configure(cases.first(router), hidden=5)
    p = harness.problem(moe, width=WIDTH, positions=10)
    p = p._replace(x=p.x.astype(jnp.bfloat16))
    step = functools.partial(harness.value_of, moe=moe, mode=Mode(True, moe.capacity_factor))
    mesh = mesh_of()
    with jax.set_mesh(mesh):
        trace = jax.make_jaxpr(jax.grad(step, has_aux=True), return_shape=True)
        program, ((_, _, gradient), (y, sums, _)) = trace(*harness.put(p, mesh, moe))
    every = list(equations(program.jaxpr))
    heads = {w.shape for w in p.heads.values()}
    of_router = heads | {shape[::-1] for shape in heads}
    dots = [e for e in every if e.primitive.name == "dot_general"]
    router_dots = [e for e in dots if {v.aval.shape for v in (*e.invars, *e.outvars)} & of_router]
    assert len(router_dots) >= 3 * len(heads), "forward, its transpose to x, and to the router"
    for e in router_dots:
        assert {v.aval.dtype.name for v in (*e.invars, *e.outvars)} == {"float32"}, e
        assert set(e.params["precision"]) == {jax.lax.Precision.HIGHEST}, e
    for e in every:
        kind, seen = e.primitive.name, [v.aval.dtype for v in e.invars if hasattr(v.aval, "dtype")]
        assert kind not in SELECT or jnp.bfloat16 not in seen, e
        # The experts' own silu is in the compute type, and it is not among these.
        assert kind not in NARROW or jnp.bfloat16 not in seen or any(5 in v.aval.shape for v in e.invars), e
    assert any(e.primitive.name in SELECT for e in every) or router in ("dense", "soft")
    assert y.dtype == jnp.bfloat16
    assert {g.dtype.name for g in gradient.router.values()} <= {"float32"}
    counts = {"tokens", "requested", "routed", "rerouted", "dropped", "dropped_capacity", "dropped_width", "unserved"}
    counts |= {"requests", "load", "positive", "score_below", "gap_below"}
    for key, value in sums.items():
        assert value.dtype == (jnp.int32 if key in counts else jnp.float32), key


# ---- noise (B37) --------------------------------------------------------------------------------------------------


def test_b37_noise_belongs_to_the_row():
    """A subset of rows, another order, longer rows: every row keeps its numbers; other rows, layers, steps, uses differ."""
    jitted = harness.jit(
        lambda key, depth, ids, use, *shape: noise.uniform(key, depth, ids, use, *shape), static_argnums=(3, 4, 5)
    )

    def draw(rows, use, *shape, seed=0, step=3, depth=1):
        ids = jnp.asarray(np.asarray(rows, np.int32))
        return np.asarray(jitted(noise.step_key(seed, jnp.int32(step)), jnp.int32(depth), ids, use, *shape))

    six = [0, 1, 2, 3, 4, 5]
    for use, width in (("router", 1), ("dropout", 11)):
        whole = draw(six, use, 8, width)
        np.testing.assert_array_equal(draw([4, 1], use, 8, width), whole[[4, 1]])
        np.testing.assert_array_equal(draw([2, 7], use, 13, width)[:1, :8], whole[[2]])
        assert whole.min() >= 0
        assert whole.max() < 1
    whole = draw(six, "router", 8, 1)
    assert len(np.unique(whole)) == whole.size
    others = [draw(six, "router", 8, 1, **other) for other in ({"depth": 2}, {"step": 4}, {"seed": 1})]
    for other in (*others, draw(six, "jitter", 8, 1), draw(six, "dropout", 8, 1)):
        assert not np.isin(other, whole).any()


@pytest.mark.parametrize("case", ["noisy_topk-warm", pytest.param("random", marks=pytest.mark.soak)])
def test_b37_a_row_routes_alike_among_any_neighbours(mesh_of, case):
    """Learned noise, random choice and dropout: a row alone, longer or among others asks for the same; another id asks otherwise."""
    moe = cases.configure(case, capacity_factor=None, reroute=False)
    p, mode = harness.problem(moe, rows=4, positions=8), Mode(True, None, record=True)
    wide = harness.problem(moe, seed=1, rows=4, positions=12)

    def requests(p):
        return harness.forward(p, mesh_of(), moe, mode)[2].original.reshape(*p.valid.shape, -1)

    plain = requests(p)
    x, valid = wide.x.copy(), np.zeros_like(wide.valid)
    order = [2, 0, 3, 1]
    x[:, :8], valid[:, :8] = p.x[order], p.valid[order]
    moved = wide._replace(x=x, valid=valid, row_ids=p.row_ids[order], heads=p.heads, state=p.state)
    longer = requests(moved)[:, :8]
    np.testing.assert_array_equal(longer[p.valid[order]], plain[order][p.valid[order]])
    assert (requests(p._replace(row_ids=p.row_ids + 100)) != plain).any()


def test_annotations_are_checked():
    """The switchboard works: a wrong rank, a wrong type and disagreeing dimensions are errors in the tests."""
    with pytest.raises(Exception, match="Type-check error"):
        routers.logits(jnp.ones((2, 3)), jnp.ones(3))
    with pytest.raises(Exception, match="Type-check error"):
        routers.logits(jnp.ones((2, 3)), jnp.ones((4, 5)))
    with pytest.raises(Exception, match="Type-check error"):
        layer.check(config.MoE(), "128")
    with pytest.raises(ValueError, match="rank_promotion"):
        jnp.ones((2, 3)) + jnp.ones(3)
    with pytest.raises(Exception, match="strict"):
        jnp.ones(3, jnp.bfloat16) + jnp.ones(3, jnp.float32)
