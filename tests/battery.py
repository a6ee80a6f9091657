"""What every router is held to, as functions of a config: they raise AssertionError. No layer, no mesh: Inputs in, integers out.

Many groups go through one compiled call. Among them are groups of ties, of repeated tokens, of tokens that all want the same, and
groups with no valid token.
"""

import dataclasses
import functools
from typing import NamedTuple

import harness
import jax
import jax.numpy as jnp
import numpy as np
import oracle

from moejax.arrays import NOWHERE, Assignment, SoftAssignment
from moejax.errors import ConfigError
from moejax.moe import assignment, balancers, layer, stats
from moejax.moe.records import Inputs, columns
from moejax.moe.routers import ROUTERS

GROUPS, SIZE = 200, 6


class Result(NamedTuple):
    """A router's answer on groups; of tokens [G, S, ...] what can be told token by token."""

    tokens: dict[str, np.ndarray]
    sums: dict[str, np.ndarray]
    losses: dict[str, np.ndarray]
    placed: Assignment | SoftAssignment


# ---- inputs -------------------------------------------------------------------------------------------------------


def draw(moe, seed=0, training=True, groups=GROUPS) -> Inputs:
    """Inputs as NumPy. Of every four groups the first has logits on a coarse grid (ties), the second repeats tokens, the third
    has tokens that all like the low ids, the fourth is plain; where no tie survives rounding there is no grid."""
    rng, kind = np.random.default_rng(seed), ROUTERS[moe.router]
    shape, width = (groups, SIZE), columns(moe)
    heads = kind.heads(moe)
    logits = rng.normal(size=(*shape, heads.get("logits", width)))
    if exact(moe):
        logits[::4] = rng.integers(-4, 5, logits[::4].shape) / 4
    logits[1::4] = np.take_along_axis(logits[1::4], rng.integers(0, 2, shape)[1::4, :, None], axis=1)
    logits[2::4] += np.linspace(3, 0, logits.shape[-1])
    noise = rng.random((*shape, kind.noise(moe))) if kind.noise(moe) and (training or kind.always_random) else None
    if noise is not None and kind.always_random:
        noise[::4] = np.round(noise[::4] * 8) / 8
    hidden = rng.random((*shape, width)) < moe.router_dropout if moe.router_dropout and training else None
    return Inputs(
        logits=harness.f32(logits if "logits" in heads else np.zeros_like(logits)),
        spread=harness.f32(rng.normal(size=(*shape, width)) - 1) if "spread" in heads else None,
        valid=rng.random(shape) < np.array([0.9, 0.6, 1, 0.8, 0])[np.arange(groups) % 5, None],
        ids=rng.integers(0, 2**31, shape).astype(np.int32),
        position=np.broadcast_to(np.arange(SIZE, dtype=np.int32), shape),
        noise=None if noise is None else harness.f32(noise),
        hidden=hidden,
        state=harness.state_of(moe, rng),
        layer=np.int32(harness.LAYER),
        step=np.int32(harness.STEP),
    )


def exact(moe):
    """Whether equal logits stay equal through selection and priority, whatever the rounding."""
    kind = ROUTERS[moe.router]
    return not moe.sinkhorn and moe.order != "priority" and (kind.token_choice or kind.soft)


PER_TOKEN = ("logits", "spread", "ids", "noise", "hidden")
"""What the inputs say of a token beside whether it is valid and where it is."""


def contents(inputs: Inputs, change) -> Inputs:
    """The same with `change(array [G, S, ...], name)` in place of every array of PER_TOKEN."""
    new = {name: change(getattr(inputs, name), name) for name in PER_TOKEN if getattr(inputs, name) is not None}
    return inputs._replace(**new)


# ---- the library --------------------------------------------------------------------------------------------------


@functools.cache
def _compiled(moe, tables):
    kind = ROUTERS[moe.router]
    slots = assignment.capacity(moe.capacity_factor, moe.top_k, moe.num_experts, SIZE)

    def run(inputs, limit):
        routed = kind.assign(inputs, limit, slots, moe)
        placed = kind.weigh(inputs, routed, moe)
        seen = balancers.Seen(inputs, routed, placed, kind.distribution(inputs, moe), SIZE)
        sums = stats.router_sums(seen) | balancers.sums(seen, moe)
        on = [name for name in harness.LOSSES if name in balancers.ALWAYS or getattr(moe, name)]
        return routed, placed, sums, {name: balancers.BALANCERS[name].loss(sums, moe) for name in on}

    return harness.jit(run)


def call(moe, inputs: Inputs, limit=None) -> Result:
    """The router, its statistics and losses; `limit` [G] in place of the capacity."""
    if limit is None:
        limit = [oracle.capacity(harness.spec_of(moe, moe.capacity_factor), int(n)) for n in inputs.valid.sum(axis=1)]
    run = _compiled(moe, harness.tables(moe))
    arrays = jax.tree.map(jnp.asarray, inputs)
    routed, placed, sums, losses = jax.tree.map(np.asarray, run(arrays, jnp.asarray(limit, jnp.int32)))
    assert sums["routed"] + sums["rerouted"] + sums["dropped"] == sums["requested"], "B4"
    return Result(by_token(moe, routed, placed), sums, losses, placed)


def by_token(moe, routed, placed):
    """Decisions by token: [G, S, K] of token choice, [G, S, E] where experts choose, [G, S, E, C] of soft weights. What is not
    asked for is the same everywhere, whatever the router says of it."""
    kind, (groups, size) = ROUTERS[moe.router], routed.margin.shape
    if kind.soft:
        return {"dispatch": placed.dispatch, "combine": placed.combine}
    slot = np.where(routed.slot == NOWHERE, -1, routed.slot)
    found = {"expert": routed.expert, "original": routed.original, "slot": slot, "gate": placed.gate}
    found["rerouted"] = (slot >= 0) & (routed.expert != routed.original)
    if kind.token_choice:
        found = {name: np.where(routed.asked, a, 0).reshape(groups, size, -1) for name, a in found.items()}
        found["asked"] = routed.asked.reshape(groups, size, -1)
        return found | {"excess": routed.excess, "margin": routed.margin}
    wide = {"slot": np.full((groups, size, moe.num_experts), -1), "gate": np.zeros((groups, size, moe.num_experts))}
    for g, a in np.argwhere(routed.asked):
        for name in wide:
            assert wide["slot"][g, routed.token[g, a], routed.expert[g, a]] == -1 or name == "gate", "taken twice"
            wide[name][g, routed.token[g, a], routed.expert[g, a]] = found[name][g, a]
    return wide


# ---- the oracle ---------------------------------------------------------------------------------------------------


def check_oracle(moe, inputs: Inputs):
    """Experts, requests, places, rerouting, excess and margins exactly, on bit-equal logits; gates, sums and losses to 1e-5."""
    actual, spec = call(moe, inputs), harness.spec_of(moe, moe.capacity_factor)
    logits = np.zeros((*inputs.valid.shape, 0)) if moe.score == "constant" else inputs.logits.astype(np.float64)
    if ROUTERS[moe.router].soft:
        weights = oracle.soft_weights(logits, inputs.valid, spec)
        for name, weight in zip(("dispatch", "combine"), weights, strict=True):
            harness.close(actual.tokens[name], weight.reshape(actual.tokens[name].shape), 1e-5, name)
        return harness.same_sums(actual.sums, oracle.soft_statistics(logits, inputs.valid, spec))
    draws = oracle.Draws(inputs.noise, None if inputs.hidden is None else np.where(inputs.hidden, 0, 1))
    routing = oracle.route(
        logits, inputs.valid, spec, draws, inputs.spread, inputs.ids, harness.LAYER, harness.bias_of(inputs.state),
        inputs.state.get("threshold"),
    )  # fmt: skip
    wanted = of_routing(moe, routing)
    for name, value in actual.tokens.items():
        mask = inputs.valid.reshape(inputs.valid.shape + (1,) * (value.ndim - 2))
        value, other = np.where(mask, value, 0), np.where(mask, wanted[name], 0)
        harness.close(value, other, 1e-5, name)
    sums = oracle.statistics(logits, inputs.valid, routing, spec, inputs.spread)
    harness.same_sums(actual.sums, sums)
    check_losses(actual, logits, inputs.valid, routing, spec, sums)


def of_routing(moe, routing):
    """The oracle's Routing as `by_token` has the library's."""
    shape, columns_ = routing.margin.shape, ("expert", "original", "slot", "gate", "rerouted")
    if ROUTERS[moe.router].token_choice:
        wide = {name: np.where(routing.asked, getattr(routing, name), 0).reshape(*shape, -1) for name in columns_}
        wide["rerouted"] &= wide["slot"] >= 0
        return wide | {"asked": routing.asked.reshape(*shape, -1), "excess": routing.excess, "margin": routing.margin}
    wide = {"slot": np.full((*shape, moe.num_experts), -1), "gate": np.zeros((*shape, moe.num_experts))}
    for name, table in wide.items():
        table[routing.row, routing.position, routing.expert] = getattr(routing, name)
    return wide


def check_losses(actual: Result, logits, valid, routing, spec, sums):
    """The balancers' losses that the oracle has."""
    everything = [list(np.ndindex(valid.shape))]
    wanted = {
        "load_balance": lambda: oracle.load_balance_parts(logits, valid, routing, spec, everything),
        "router_z": lambda: oracle.router_z(sums),
        "importance": lambda: oracle.importance(sums, spec),
        "smooth_load": lambda: oracle.load(sums, spec),
    }
    for name, loss in actual.losses.items():
        harness.close(loss, wanted[name](), 1e-5, name)


# ---- padding and causality ------------------------------------------------------------------------------------------


def check_padding(moe, seed=0):
    """B2: valid tokens pushed apart by invalid ones of any contents are routed as they were, and counted as they were."""
    one, other = draw(moe, seed), draw(moe, seed + 1)
    apart, together = one.valid, np.sort(~one.valid, axis=1) == 0
    assert (apart != together).any()

    def change(array, name):
        wide = getattr(other, name).copy()
        wide[apart] = array[together]
        return wide

    before = call(moe, one._replace(valid=together))
    after = call(moe, contents(one, change)._replace(position=change(one.position, "position")))
    for name, value in before.tokens.items():
        harness.close(after.tokens[name][apart], value[together], 1e-6, name)
    for name, value in before.sums.items():
        harness.close(after.sums[name], value, 1e-6, name)


def declared_causal(moe) -> bool:
    """Whether the library takes the config without allow_noncausal."""
    layer.check(moe, context=SIZE)
    try:
        layer.check(dataclasses.replace(moe, allow_noncausal=False), context=SIZE)
    except ConfigError:
        return False
    return True


def leaks(moe, seed=0) -> bool:
    """Whether other contents of later tokens, validity held fixed, change one bit of what became of earlier ones."""
    one, other = draw(moe, seed), draw(moe, seed + 1)
    cut = np.random.default_rng(seed).integers(1, SIZE, (GROUPS, 1))
    past = np.arange(SIZE) < cut

    def change(array, name):
        return np.where(past.reshape(past.shape + (1,) * (array.ndim - 2)), array, getattr(other, name))

    before, after = call(moe, one).tokens, call(moe, contents(one, change)).tokens
    changed = any((before[name][~past] != after[name][~past]).any() for name in before)
    assert changed or (moe.score, moe.hash_by) == ("constant", "position"), "the future did not change"
    return any((before[name][past] != after[name][past]).any() for name in before)


def check_rerouting(moe, seed=0):
    """B5: with C * (E - k + 1) > k * (valid - 1) places in every group, and no more, rerouting drops nothing for want of one."""
    inputs, spare = draw(moe, seed), moe.num_experts - moe.top_k + 1
    limit = moe.top_k * np.maximum(inputs.valid.sum(axis=1) - 1, 0) // spare + 1
    sums = call(moe, inputs, limit).sums
    assert sums["rerouted"] > 0 and sums["dropped_capacity"] == 0, sums


def check_causal(moe):
    """B3: what is declared causal is, to the bit; what is declared non-causal is not, or it is refused for nothing."""
    causal = declared_causal(moe)
    assert leaks(moe) != causal, f"declared {'causal' if causal else 'non-causal'}"
