"""Who guards the battery: routers that are wrong on purpose, and the check that must see it."""

import dataclasses
import functools

import battery
import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.arrays import Assignment, count
from moejax.moe import balancers, places
from moejax.moe.balancers import BALANCERS
from moejax.moe.balancers.api import share
from moejax.moe.places import ORDERS
from moejax.moe.routers import ROUTERS, api, selection, top_k

pytestmark = pytest.mark.usefixtures("strict_dtypes")


def oracle_sees(moe):
    battery.check_oracle(moe, battery.draw(moe))


def wrong(monkeypatch, name, **fields):
    """The router `name` with other fields."""
    monkeypatch.setitem(ROUTERS, name, dataclasses.replace(ROUTERS[name], **fields))


@pytest.mark.parametrize("order", ["priority", "choice_major"])
def test_orders_declared_causal_that_are_not(monkeypatch, order):
    """Dropping by probability, and all first choices before any second, change past tokens when only the future changes."""
    monkeypatch.setitem(ORDERS, order, dataclasses.replace(ORDERS[order], causal=lambda k: True))
    moe = cases.configure("topk-plain", order=order)
    assert battery.declared_causal(moe)
    with pytest.raises(AssertionError, match="declared causal"):
        battery.check_causal(moe)


def test_an_order_refused_for_nothing(monkeypatch):
    monkeypatch.setitem(ORDERS, "position", dataclasses.replace(ORDERS["position"], causal=lambda k: False))
    with pytest.raises(AssertionError, match="declared non-causal"):
        battery.check_causal(cases.configure("topk-plain", order="position"))


def test_a_router_that_looks_ahead(monkeypatch):
    """Every token sees a tenth of the next one's logits."""

    def assign(inputs, limit, slots, moe):
        later = jnp.concatenate([inputs.logits[:, 1:], inputs.logits[:, :1]], axis=1)
        return kind.assign(inputs._replace(logits=inputs.logits + 0.1 * later), limit, slots, moe)

    kind = ROUTERS["topk"]
    wrong(monkeypatch, "topk", assign=assign)
    with pytest.raises(AssertionError, match="declared causal"):
        battery.check_causal(cases.CONFIGS["topk"])


def test_a_load_balance_loss_of_first_choices_only(monkeypatch):
    def sums(seen, moe):
        shape = (*seen.inputs.valid.shape, -1)
        first = seen.routed.original.reshape(shape)[..., 0]
        asked = seen.routed.asked.reshape(shape)[..., 0]
        width = seen.distribution.shape[-1]
        return {"first": count(places.one_hot(first, width) & asked[..., None], axis=(0, 1))}

    def loss(stats, moe):
        f = share(stats["first"], jnp.sum(stats["first"], dtype=jnp.int32))
        return jnp.sum(f * share(stats["probability"], stats["tokens"]) / balancers.targets(moe))

    kind = BALANCERS["load_balance"]
    monkeypatch.setitem(BALANCERS, "load_balance", dataclasses.replace(kind, loss=loss, sums=sums))
    with pytest.raises(AssertionError, match="load_balance"):
        oracle_sees(cases.CONFIGS["topk-plain"])


def test_a_selection_bias_in_the_gate(monkeypatch):
    def weigh(inputs, routed, moe):
        return kind.weigh(inputs._replace(logits=inputs.logits + inputs.state["sign_bias"]), routed, moe)

    kind = ROUTERS["topk"]
    wrong(monkeypatch, "topk", weigh=weigh)
    with jax.numpy_rank_promotion("allow"), pytest.raises(AssertionError, match="gate"):
        oracle_sees(cases.CONFIGS["topk-one"])


def test_gates_that_forget_who_was_rerouted(monkeypatch):
    """Gates of the experts that were asked for, not of those that were reached."""

    def weigh(inputs, routed, moe):
        asked_for = kind.weigh(inputs, routed._replace(expert=routed.original), moe)
        return Assignment(routed.token, routed.expert, asked_for.gate, routed.slot)

    kind = ROUTERS["topk"]
    wrong(monkeypatch, "topk", weigh=weigh)
    with pytest.raises(AssertionError, match="gate"):
        oracle_sees(cases.CONFIGS["topk"])


def test_ties_to_the_higher_id(monkeypatch):
    def assign(inputs, limit, slots, moe):
        def choose(inputs, moe):
            backward, margin = selection.top(inputs.logits[..., ::-1], moe.top_k)
            return top_k.topk(inputs, moe)._replace(expert=inputs.logits.shape[-1] - 1 - backward, margin=margin)

        return api.token_choice(choose, api.scored)(inputs, limit, slots, moe)

    wrong(monkeypatch, "topk", assign=assign)
    with pytest.raises(AssertionError, match="expert"):
        oracle_sees(cases.configure("topk-plain", orthogonality=0.0))


def test_padding_that_takes_places(monkeypatch):
    def assign(inputs, limit, slots, moe):
        return kind.assign(inputs._replace(valid=jnp.ones_like(inputs.valid)), limit, slots, moe)

    kind = ROUTERS["topk"]
    wrong(monkeypatch, "topk", assign=assign)
    with pytest.raises(AssertionError):
        battery.check_padding(cases.CONFIGS["topk-plain"])


@pytest.fixture
def rerouted_by(monkeypatch):
    """rerouted_by(function): in place of places.reroute, in programs compiled anew."""

    def put(function):
        monkeypatch.setattr(places, "reroute", function)
        monkeypatch.setattr(battery, "_compiled", functools.cache(battery._compiled.__wrapped__))

    return put


def test_rerouting_by_another_preference(rerouted_by):
    """To the expert with the lowest id that has room."""
    right = places.reroute
    rerouted_by(lambda expert, asked, preference, room: right(expert, asked, jnp.zeros_like(preference), room))
    with pytest.raises(AssertionError):
        oracle_sees(cases.CONFIGS["hash"])


def test_rerouting_that_gives_up(rerouted_by):
    """B5 fails where overflow is dropped although there is room."""

    def reroute(expert, asked, preference, room):
        rank = places.by_position(expert, asked, preference[..., 0], preference.shape[-1])
        free = asked & (rank < jnp.take_along_axis(room[:, None], expert, axis=-1))
        return expert, jnp.where(free, rank, np.iinfo(np.int32).max)

    rerouted_by(reroute)
    with pytest.raises(AssertionError):
        battery.check_rerouting(cases.CONFIGS["hash"])


def test_a_name_without_a_case(monkeypatch):
    monkeypatch.setitem(ROUTERS, "oracle", ROUTERS["topk"])
    monkeypatch.setitem(BALANCERS, "prayer", BALANCERS["router_z"])
    moes = {case: moe for case, moe in cases.CONFIGS.items() if moe.score != "sqrt_softplus"}
    assert cases.missing(moes) == ["router oracle", "score sqrt_softplus", "balancer prayer"]
