"""Every router: choices and gates against the oracle, causality, the task gradient at k = 1, precision, noise."""

import dataclasses
import functools

import harness
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from moejax import config
from moejax.arrays import NOWHERE
from moejax.errors import ConfigError
from moejax.moe import assignment, layer, noise, router, stats
from moejax.moe.layer import Mode
from moejax.moe.router import ROUTERS

pytestmark = pytest.mark.usefixtures("strict_dtypes")

E, B, T = 8, 4, 12
OPTIONS = {
    "softmax_topk": [
        {"top_k": 2},
        {"top_k": 1, "renormalize": False},
        {"top_k": 3, "renormalize": False, "gate_scale": 2.5},
        {"top_k": E},
    ],
    "switch": [{"top_k": 1}],
    "gshard": [{"top_k": 2}, {"top_k": 2, "gate_scale": 0.5}],
}
"""A new router joins by one line here."""

CASES = [config.MoE(num_experts=E, router=name, **options) for name in ROUTERS for options in OPTIONS[name]]
each_case = pytest.mark.parametrize("moe", CASES, ids=lambda m: f"{m.router}-{m.top_k}-{m.gate_scale}")


@functools.cache
def routed(moe, factor=1.0):
    """Jitted (logits [B,T,E], uniform or None, valid) -> Choice, Assignment, sums, in groups; and in batch order."""

    def run(logits, uniform, valid):
        positions = logits.shape[1]
        logits, valid = assignment.group(logits, moe), assignment.group(valid, moe)
        choice = ROUTERS[moe.router].choose(logits, None if uniform is None else assignment.group(uniform, moe), moe)
        limit = assignment.capacity(factor, moe.top_k, E, jnp.sum(valid, axis=1, dtype=jnp.int32))
        placed = assignment.place(choice, valid, limit, E)
        slot = placed.slot.reshape(choice.expert.shape)
        tokens = [assignment.ungroup(a, moe, positions) for a in (*choice, slot)]
        return choice, placed, stats.router_sums(logits, choice, placed, valid), tokens

    return harness.jit(run)


def draw(moe, seed=0, positions=T):
    """Logits on a coarse grid, so that ties are common; uniform numbers; a mask."""
    rng = np.random.default_rng(seed)
    logits = (rng.integers(-6, 7, (B, positions, E)) / 4).astype(np.float32)
    uniform = rng.random((B, positions)).astype(np.float32) if ROUTERS[moe.router].random else None
    return logits, uniform, rng.random((B, positions)) < 0.8


def call(moe, logits, uniform, valid):
    out = routed(moe)(jnp.asarray(logits), None if uniform is None else jnp.asarray(uniform), jnp.asarray(valid))
    return jax.tree.map(np.asarray, out)


@each_case
def test_choices_equal_the_oracles(moe):
    """Experts, requests and places exactly on bit-equal logits with ties; gates to 1e-5. B4: the counts add up."""
    noises = (True, False) if ROUTERS[moe.router].random else (False,)
    for seed, noisy in enumerate(noises):
        logits, uniform, valid = draw(moe, seed)
        uniform = uniform if noisy else None
        choice, placed, sums, _ = call(moe, logits, uniform, valid)
        wanted = oracle.route(logits.astype(np.float64), valid, harness.spec_of(moe, 1.0), uniform)
        np.testing.assert_array_equal(choice.expert, wanted.expert)
        np.testing.assert_array_equal(choice.wanted, wanted.wanted)
        np.testing.assert_allclose(choice.gate, wanted.gate, rtol=1e-5)
        slot = np.where(placed.slot == NOWHERE, -1, placed.slot).reshape(wanted.slot.shape)
        np.testing.assert_array_equal(slot, wanted.slot)
        assert sums["routed"] + sums["rerouted"] + sums["dropped"] == sums["requested"] > 0
        assert moe.top_k == E or sums["dropped"] > 0


def test_every_router_is_listed():
    assert set(OPTIONS) == set(ROUTERS)
    for moe in CASES:
        router.check(moe)


@each_case
@pytest.mark.parametrize("grouping", [{}, {"group_rows": 2}, {"group_window": 4}], ids=["rows", "pairs", "windows"])
def test_b03_the_past_is_free_of_the_future(moe, grouping):
    """Other contents from position t on, validity held fixed: not a bit of what came before changes, places included."""
    if not ROUTERS[moe.router].causal:
        pytest.skip("declared non-causal")
    if grouping and moe.gate_scale != 1:
        pytest.skip("the scale has nothing to do with groups")
    moe = dataclasses.replace(moe, **grouping)
    logits, uniform, valid = draw(moe)
    other, other_uniform, _ = draw(moe, seed=9)

    before = call(moe, logits, uniform, valid)[3]
    for t in (1, 5, T - 1):
        changed = np.concatenate([logits[:, :t], other[:, t:]], axis=1)
        uniforms = uniform if uniform is None else np.concatenate([uniform[:, :t], other_uniform[:, t:]], axis=1)
        after = call(moe, changed, uniforms, valid)[3]
        for a, b in zip(before, after, strict=True):
            np.testing.assert_array_equal(a[:, :t], b[:, :t])
        assert (before[0][:, t:] != after[0][:, t:]).any()


def test_b03_the_noncausal_are_refused(monkeypatch):
    for name, kind in ROUTERS.items():
        monkeypatch.setitem(ROUTERS, name, dataclasses.replace(kind, causal=False))
        moe = config.MoE(num_experts=E, router=name, **OPTIONS[name][0])
        with pytest.raises(ConfigError, match="allow_noncausal"):
            router.check(moe)
        router.check(dataclasses.replace(moe, allow_noncausal=True))


@each_case
def test_b02_padding_changes_no_choice(moe):
    """Invalid positions and rows appended, whatever they hold: places and sums of the valid are the same, exactly."""
    logits, uniform, valid = draw(moe)
    more, more_uniform, _ = draw(moe, seed=4, positions=T + 6)

    def pad(x, extra):
        wide = np.concatenate([x, extra[:, T:]], axis=1)
        return np.concatenate([wide, extra[:2]], axis=0)

    uniforms = uniform if uniform is None else pad(uniform, more_uniform)
    _, placed, sums, _ = call(moe, logits, uniform, valid)
    _, placed_, sums_, _ = call(moe, pad(logits, more), uniforms, pad(valid, np.zeros((B, T + 6), bool)))
    tokens = T * moe.top_k
    for name in ("expert", "gate", "slot"):
        np.testing.assert_array_equal(getattr(placed_, name)[:B, :tokens], getattr(placed, name))
    assert (placed_.slot[:, tokens:] == NOWHERE).all()
    assert (placed_.slot[B:] == NOWHERE).all()
    for name, value in sums.items():
        harness.close(sums_[name], value, 1e-6 if value.dtype == np.float32 else 0, name)


# ---- k = 1 (B6) ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "options"), [("switch", {}), ("softmax_topk", {"renormalize": False})])
def test_b06_one_expert_teaches_the_router(mesh_of, name, options):
    """The task's gradient on the router at k = 1, with no aux loss, is the finite difference, and not zero."""
    moe = config.MoE(num_experts=E, top_k=1, hidden=4, router=name, **options)
    rng, mode = np.random.default_rng(0), Mode(True, None)
    p = harness.problem(seed=2)
    p = p._replace(router=rng.normal(size=p.router.shape).astype(np.float32))
    task = functools.partial(harness.run, mesh=mesh_of(), moe=moe, mode=mode, coefficients=(0, 0))
    gradient, epsilon = task(p)[3][1], 1e-3
    direction = np.sign(gradient).astype(np.float32)
    ahead, behind = (task(p._replace(router=p.router + s * epsilon * direction)) for s in (1, -1))
    np.testing.assert_array_equal(ahead[2]["load"], behind[2]["load"])
    slope = (float(ahead[0]) - float(behind[0])) / (2 * epsilon)
    assert slope == pytest.approx((gradient * direction).sum(), rel=5e-3)
    assert np.abs(gradient).max() > 1e-2


@pytest.mark.parametrize(
    "options",
    [
        {"top_k": 1},
        {"router": "switch", "top_k": 2},
        {"router": "gshard", "top_k": 1},
        {"gate_scale": 0.0},
        {"gate_scale": float("nan")},
        {"router": "softmax"},
        {"top_k": 0},
        {"top_k": 9},
        {"jitter": 1.0},
    ],
)
def test_b06_b31_refused_with_the_remedy(options):
    """A gate that cannot move, and choices that cannot be made; the message names the option."""
    key = next(iter(options))
    with pytest.raises(ConfigError, match=f"model.moe.({key}|top_k)=.*(set|choose|lower)|half width"):
        router.check(config.MoE(num_experts=E, **options))


# ---- precision (B9) -----------------------------------------------------------------------------------------------


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
    step = jax.jit(jax.grad(lambda x, w: jnp.sum(jnp.square(router.logits(x, w))), argnums=(0, 1)))
    dots = [d for d in step.trace(x, w).lower(lowering_platforms=("tpu",)).as_text().splitlines() if "dot_general" in d]
    assert len(dots) == 3
    assert all("[HIGHEST, HIGHEST]" in d and "bf16" not in d for d in dots)


@pytest.mark.parametrize("name", ROUTERS)
def test_b09_routing_is_fp32_under_bf16(mesh_of, name):
    """In the jaxpr, backward included: router dots take fp32 at HIGHEST, selection sees fp32, counts are int32."""
    moe = config.MoE(num_experts=E, hidden=5, router=name, **OPTIONS[name][0])
    p = harness.problem(width=6, positions=10, hidden=5)
    p = p._replace(x=p.x.astype(jnp.bfloat16))
    step = functools.partial(harness._value, moe=moe, mode=Mode(True, None))
    mesh = mesh_of()
    with jax.set_mesh(mesh):
        trace = jax.make_jaxpr(jax.grad(step, argnums=(0, 1), has_aux=True), return_shape=True)
        program, ((_, gradient), (y, sums)) = trace(*harness.put(p, mesh), jnp.zeros(2, jnp.float32))
    every = list(equations(program.jaxpr))
    dots = [e for e in every if e.primitive.name == "dot_general"]
    shapes = [{v.aval.shape for v in (*e.invars, *e.outvars)} for e in dots]
    router_dots = [e for e, s in zip(dots, shapes, strict=True) if s & {(6, E), (E, 6)}]
    assert len(router_dots) >= 3, "forward, its transpose to x, and to the router"
    for e in router_dots:
        assert {v.aval.dtype.name for v in (*e.invars, *e.outvars)} == {"float32"}, e
        assert set(e.params["precision"]) == {jax.lax.Precision.HIGHEST}, e
    selections = [e for e in every if e.primitive.name == "top_k"]
    assert len(selections) == 1
    assert selections[0].invars[0].aval.dtype == jnp.float32
    assert y.dtype == jnp.bfloat16
    assert gradient.router.dtype == jnp.float32
    counts = {"tokens", "requested", "routed", "rerouted", "dropped", "requests", "load"}
    for key, value in sums.items():
        assert value.dtype == (jnp.int32 if key in counts else jnp.float32), key
    narrow = [
        e for e in every if e.primitive.name in ("exp", "log", "cumsum") and e.outvars[0].aval.dtype == jnp.bfloat16
    ]
    assert not narrow


def test_b09_few_tokens_differ_from_float64():
    """256 experts, top 8: the chosen set differs from float64's for fewer than one token in a thousand."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(1, 8192, 64)), jnp.bfloat16)
    weight = rng.normal(size=(64, 256)).astype(np.float32) / 8
    moe = config.MoE(num_experts=256, top_k=8)
    choose = harness.jit(lambda x, w: ROUTERS["softmax_topk"].choose(router.logits(x, w), None, moe).expert)
    got = np.sort(np.asarray(choose(x, jnp.asarray(weight)))[0], axis=-1)
    exact = np.asarray(x[0], np.float64) @ weight.astype(np.float64)
    wanted = np.sort(np.argsort(-exact, axis=-1, kind="stable")[:, :8], axis=-1)
    assert (got != wanted).any(axis=-1).mean() < 1e-3


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
    whole = draw(six, "router", 8)
    np.testing.assert_array_equal(draw([4, 1], "router", 8), whole[[4, 1]])
    np.testing.assert_array_equal(draw([2], "router", 20)[:, :8], whole[[2]])
    np.testing.assert_array_equal(draw([2, 7], "jitter", 13, 5)[:1, :8], draw([2], "jitter", 8, 5))
    assert len(np.unique(whole)) == whole.size
    assert whole.min() >= 0
    assert whole.max() < 1
    others = [draw(six, "router", 8, **other) for other in ({"depth": 2}, {"step": 4}, {"seed": 1})]
    for other in (*others, draw(six, "jitter", 8)):
        assert not np.isin(other, whole).any()


def test_annotations_are_checked():
    """The switchboard works: a wrong rank, a wrong type and disagreeing dimensions are errors in the tests."""
    with pytest.raises(Exception, match="Type-check error"):
        router.logits(jnp.ones((2, 3)), jnp.ones(3))
    with pytest.raises(Exception, match="Type-check error"):
        router.logits(jnp.ones((2, 3)), jnp.ones((4, 5)))
    with pytest.raises(Exception, match="Type-check error"):
        layer.check(config.MoE(), "128")
    with pytest.raises(ValueError, match="rank_promotion"):
        jnp.ones((2, 3)) + jnp.ones(3)
    with pytest.raises(Exception, match="strict"):
        jnp.ones(3, jnp.bfloat16) + jnp.ones(3, jnp.float32)
