"""Every router: the oracle's choices, places, gates, sums and losses, padding, causality, rerouting, the task gradient at k = 1."""

import dataclasses

import battery
import cases
import harness
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax import config
from moejax.moe import layer, places, routers
from moejax.moe.inputs import Mode
from moejax.moe.routers import ROUTERS, top_k

pytestmark = pytest.mark.usefixtures("strict_dtypes")

each_case = pytest.mark.parametrize("case", cases.CASES)


def test_every_name_has_a_case():
    """Routers, scores, orders and balancers; and each case is a config that the library takes."""
    assert not cases.missing(cases.CONFIGS)
    for moe in cases.CONFIGS.values():
        layer.check(moe, context=battery.SIZE)
    without = {name: moe for name, moe in cases.CONFIGS.items() if moe.router != "relu" and moe.order != "priority"}
    assert cases.missing(without) == ["router relu", "order priority", "balancer sparsity"]


@each_case
def test_choices_equal_the_oracles(case):
    """200 groups with ties, padding and overflow: integers exactly, gates, sums and losses to 1e-5. B4: the counts add up."""
    moe = cases.CONFIGS[case]
    inputs = battery.draw(moe)
    battery.check_oracle(moe, inputs)
    assert not inputs.valid.all() and not inputs.valid.any(axis=1).all()
    sums = battery.call(moe, inputs).sums
    bounded = moe.zero_experts or not ROUTERS[moe.router].token_choice
    assert bounded or sums["dropped_capacity"] > 0
    assert sums["rerouted"] > 0 or not moe.reroute
    assert sums["dropped_width"] > 0 or moe.router not in ("top_p", "threshold", "relu")


@pytest.mark.parametrize("case", ["gshard", "noisy_topk", "random", "topk-sqrt"])
def test_evaluation_equals_the_oracles(case):
    """Without noise and dropout, but for the router that always draws."""
    moe = cases.CONFIGS[case]
    battery.check_oracle(moe, battery.draw(moe, seed=3, training=False))


@each_case
def test_b02_padding_changes_nothing(case):
    battery.check_padding(cases.CONFIGS[case])


@each_case
def test_b03_declared_causal_is_causal(case):
    """Other contents of later tokens change not a bit of the past. What is refused without allow_noncausal does leak."""
    battery.check_causal(cases.CONFIGS[case])


@pytest.mark.parametrize("order", places.ORDERS)
def test_b03_orders(order):
    """By choice leaks from two choices on, and at one is by position; by priority leaks always."""
    moe = cases.configure("switch-first", order=order)
    battery.check_causal(moe)
    assert battery.declared_causal(moe) == (order != "priority")
    moe = cases.configure("topk-plain", order=order)
    assert battery.declared_causal(moe) == (order == "position")


@pytest.mark.parametrize("case", [c for c, moe in cases.CONFIGS.items() if moe.reroute and not moe.router_dropout])
def test_b05_rerouting_drops_nothing_where_there_is_room(case):
    battery.check_rerouting(cases.CONFIGS[case])


@pytest.mark.soak
@pytest.mark.parametrize("router", ROUTERS)
def test_every_option_that_a_router_reads(router):
    """One at a time, on top of nothing: the oracle's choices, padding, causality. Rerouting where it reads that too."""
    for name in sorted(ROUTERS[router].reads):
        for more in ({}, {"reroute": True}) if "reroute" in ROUTERS[router].reads else ({},):
            options = {other: cases.SET[other] for other in (name, *cases.TOGETHER.get(name, ()))} | more
            order = {"order": "position"} if more else {}
            moe = config.MoE(**{**cases.bare(router, name), **options, **order})
            layer.check(moe, context=battery.SIZE)
            battery.check_oracle(moe, battery.draw(moe, seed=7))
            battery.check_padding(moe)
            battery.check_causal(moe)


# ---- options of selection -------------------------------------------------------------------------------------------


def test_warm_up_by_step():
    """From 2 to 5 choices in 7 steps, whole ones: the third at step 3, the fourth at step 5, the fifth at step 7."""
    moe = config.MoE(top_k=5, top_k_start=2, top_k_steps=7)
    now = [int(top_k.k_now(jnp.int32(step), moe)) for step in (0, 2, 3, 4, 5, 6, 7, 8, 10**6)]
    assert now == [2, 2, 3, 3, 4, 4, 5, 5, 5]
    assert [int(top_k.k_now(jnp.int32(step), config.MoE(top_k=5))) for step in (0, 9)] == [5, 5]
    moe = cases.CONFIGS["topk-warm"]
    inputs = battery.draw(moe)
    for step, k in ((0, 2), (3, 2), (4, 3)):
        sums = battery.call(moe, inputs._replace(step=np.int32(step))).sums
        assert sums["requested"] == k * sums["tokens"]


def test_group_limit_and_dropout():
    """A token's experts lie in the parts it keeps, and none is hidden while enough others are not."""
    moe = cases.CONFIGS["topk-sigmoid"]
    inputs = battery.draw(moe)
    tokens = battery.call(moe, inputs).tokens
    parts = tokens["original"] // (moe.num_experts // moe.router_groups)
    reached = [len(set(parts[at][tokens["asked"][at]])) for at in zip(*np.nonzero(inputs.valid), strict=True)]
    assert max(reached) == moe.router_groups_kept < moe.router_groups
    moe = cases.CONFIGS["topk-sqrt"]
    inputs = battery.draw(moe)
    chosen = np.take_along_axis(inputs.hidden, battery.call(moe, inputs).tokens["original"], axis=2)
    enough = (~inputs.hidden).sum(axis=2) >= moe.top_k
    assert inputs.hidden[inputs.valid].any() and not chosen[inputs.valid & enough].any()


def test_ids_near_the_limit_are_hashed():
    """B19: the largest ids choose as unsigned 32-bit arithmetic says; neighbours choose otherwise."""
    moe = cases.CONFIGS["hash"]
    inputs = battery.draw(moe)
    ids = 2**31 - 1 - np.arange(inputs.ids.size).reshape(inputs.ids.shape) % 400
    inputs = inputs._replace(ids=ids.astype(np.int32))
    battery.check_oracle(moe, inputs)
    load = np.bincount(battery.call(moe, inputs).tokens["original"][inputs.valid].ravel(), minlength=moe.num_experts)
    assert load.min() > 0.7 * load.mean()


# ---- k = 1 (B6) ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["switch", "topk-one"])
def test_b06_one_expert_teaches_the_router(mesh_of, case):
    """The task's gradient on the router at k = 1, with no aux loss, is the finite difference, and not zero."""
    moe, mode = cases.configure(case, order="position", reroute=False), Mode(True, None)
    rng, p = np.random.default_rng(0), harness.problem(moe, seed=2)
    logits = rng.normal(size=p.heads["logits"].shape).astype(np.float32)

    def task(weight):
        return harness.run(p._replace(heads={"logits": weight}), mesh_of(), moe, mode, harness.TASK)

    gradient, epsilon = task(logits).gradients["router"], 1e-3
    direction = np.sign(gradient).astype(np.float32)
    ahead, behind = (task(logits + s * epsilon * direction) for s in (1, -1))
    np.testing.assert_array_equal(ahead.sums["load"], behind.sums["load"])
    slope = (float(ahead.value) - float(behind.value)) / (2 * epsilon)
    assert slope == pytest.approx((gradient * direction).sum(), rel=5e-3)
    assert np.abs(gradient).max() > 1e-2


# ---- precision of the choice (B9) -----------------------------------------------------------------------------------


def test_b09_few_tokens_differ_from_float64():
    """256 experts, top 8: the chosen set differs from float64's for fewer than one token in a thousand."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(1, 8192, 64)), jnp.bfloat16)
    weight = rng.normal(size=(64, 256)).astype(np.float32) / 8
    moe = config.MoE(num_experts=256, top_k=8)
    inputs = battery.draw(dataclasses.replace(moe, num_experts=8), groups=4)
    inputs = jax.tree.map(jnp.asarray, inputs._replace(valid=np.ones((1, 8192), bool), noise=None))
    choose = harness.jit(lambda x, w: top_k.topk(inputs._replace(logits=routers.logits(x, w)), moe).expert)
    got = np.sort(np.asarray(choose(x, jnp.asarray(weight)))[0], axis=-1)
    exact = np.asarray(x[0], np.float64) @ weight.astype(np.float64)
    wanted = np.sort(np.argsort(-exact, axis=-1, kind="stable")[:, :8], axis=-1)
    assert (got != wanted).any(axis=-1).mean() < 1e-3
