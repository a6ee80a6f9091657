"""The sparse layer, its stages in order: route, assign, weigh, count, dispatch, experts, combine. One shard_map around them."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moejax import collectives, config, sharding
from moejax.arrays import Assignment, Stats
from moejax.errors import ConfigError
from moejax.kernels.grouped_matmul import pick
from moejax.kernels.grouped_mlp import Weights
from moejax.moe import (
    assignment,
    balancers,
    experts,
    gating,
    inputs,
    pieces,
    places,
    replay,
    routers,
    specialise,
    stats,
    transport,
    visits,
    widths,
    zero_experts,
)
from moejax.moe.inputs import Mode, Moment, Tokens
from moejax.moe.pieces import Pieces
from moejax.moe.records import State
from moejax.moe.replay import Recorded
from moejax.moe.routers.api import Router
from moejax.moe.transport.plan import Plan
from moejax.sharding import Layout


class Parameters(NamedTuple):
    router: dict[str, Array]
    """f32[D, columns] of every head of the router."""
    experts: tuple[Weights, ...]
    """One for each width of experts."""
    constants: Float[Array, "n D"] | None = None
    """Vectors of the constant zero-computation experts."""


class Result(NamedTuple):
    routed: Float[Array, "B T L"]
    """Routed experts' output in the width they work in; zero for invalid tokens."""
    local: Float[Array, "B T D"] | None
    """Zero-computation experts' output; None where there are none."""
    sums: Stats
    """With a leading shard axis."""
    recorded: Recorded | None
    """Integers of routing, where the mode records."""


def check(moe: config.MoE, context: int) -> None:
    """Every rule of the sparse layer that needs neither mesh nor batch."""
    for name in ("num_experts", "hidden", "alarm_after"):
        if getattr(moe, name) < 1:
            raise ConfigError(f"model.moe.{name}={getattr(moe, name)}: at least 1")
    for name in ("shared_hidden", "latent"):
        if getattr(moe, name) < 0:
            raise ConfigError(f"model.moe.{name}={getattr(moe, name)}: a width, or 0 for none")
    if moe.shared_gate and not moe.shared_hidden:
        raise ConfigError(
            "model.moe.shared_gate=True with shared_hidden=0: there is nothing to gate; set shared_hidden"
        )
    if not 0 <= moe.alarm_share < 1:
        raise ConfigError(f"model.moe.alarm_share={moe.alarm_share}: a share in [0, 1); set 0.1")
    if moe.tensor not in sharding.LAYOUTS:
        raise ConfigError(f"model.moe.tensor={moe.tensor!r}: choose one of {', '.join(sharding.LAYOUTS)}")
    widths.check(moe)
    experts.check(moe)
    zero_experts.check(moe)
    routers.check(moe)
    assignment.check(moe, context)
    places.check(moe)
    transport.check(moe, routers.ROUTERS[moe.router])
    gating.check(moe, routers.ROUTERS[moe.router])
    balancers.check(moe)
    specialise.check(moe, routers.ROUTERS[moe.router])
    pick(moe.kernel, platform="any")  # named, because asking for it would start the devices


def sparse_layer(
    x: Float[Array, "B T D"],
    z: Float[Array, "B T L"] | None,
    tokens: Tokens,
    parameters: Parameters,
    state: State,
    moment: Moment,
    moe: config.MoE,
    mode: Mode,
    recorded: Recorded | None = None,
) -> Result:
    """Routes by x and runs the experts on z, where experts are latent, or on x (None).

    `state` is this layer's, `recorded` plays its routing back.
    """
    layout, positions = sharding.LAYOUTS[moe.tensor], x.shape[1]
    rows, whole = sharding.spec("batch", None), sharding.spec()
    vectors, groups = sharding.spec("batch", layout.position, None), sharding.spec("batch")
    weights = tuple(experts.specs(layout, w) for w in parameters.experts)
    body = jax.shard_map(
        lambda *arguments: _on_shard(*arguments, positions=positions, moe=moe, mode=mode),
        in_specs=(
            vectors,
            vectors,
            Tokens(rows, rows, groups, rows, rows),
            Parameters(whole, weights, whole),
            whole,
            whole,
            groups,
        ),
        out_specs=Result(vectors, vectors, sharding.spec(layout.shard), groups),
    )
    own_x, own_z = jax.tree.map(lambda a: jax.reshard(a, vectors), (x, z))
    result = body(own_x, own_z, tokens, parameters, state, moment, recorded)
    back = sharding.spec("batch", "position", None)
    routed, local = jax.tree.map(lambda a: jax.reshard(a, back), (result.routed, result.local))
    return result._replace(routed=routed, local=local)


def _on_shard(
    x: Array,
    z: Array | None,
    tokens: Tokens,
    parameters: Parameters,
    state: State,
    moment: Moment,
    recorded: Recorded | None,
    *,
    positions: int,
    moe: config.MoE,
    mode: Mode,
) -> Result:
    """The whole layer on the tokens of one device; logits are gathered where groups are cut, `dispatch` and `combine` talk to the
    owners of experts."""
    kind, layout = routers.ROUTERS[moe.router], sharding.LAYOUTS[moe.tensor]
    cut = Pieces(sharding.axes(layout.position), positions)
    with jax.named_scope("route"):
        seen_by = inputs.of_rows(x, tokens, parameters.router, state, moment, moe, mode, cut)
        size = seen_by.valid.shape[1]
        slots = assignment.capacity(mode.capacity_factor, moe.top_k, moe.num_experts, size)
        limit = assignment.capacity(
            mode.capacity_factor, moe.top_k, moe.num_experts, jnp.sum(seen_by.valid, axis=1, dtype=jnp.int32)
        )
        routed = kind.assign(jax.tree.map(jax.lax.stop_gradient, seen_by), limit, slots, moe)
        routed, mismatch = (routed, {}) if recorded is None else replay.play(recorded, routed)
        placed = kind.weigh(seen_by, routed, moe)

    with jax.named_scope("count"):
        seen = balancers.Seen(seen_by, routed, placed, kind.distribution(seen_by, moe), positions)
        sums = _sums_of_groups(seen, tokens, moe, mode) | mismatch
        sums = jax.tree.map(lambda s: collectives.once(s, cut.axes), sums)

    plan = _plan(moe, kind, layout, cut, size, slots)
    carrier = transport.of(moe, kind, mode.capacity_factor, sharding.axes(layout.hidden))
    mine = pieces.of_assignment(placed, cut, moe, kind.token_choice)
    carried = collectives.vary(x if z is None else z, sharding.axes(layout.hidden))
    with jax.named_scope("dispatch"):
        given, weighed = gating.scaled(assignment.group(carried, moe), mine, moe)
        physical = widths.physical(weighed, plan)
        route = carrier.route(physical, plan)
        rows = carrier.dispatch(route, given)
    with jax.named_scope("experts"):
        own = experts.local(parameters.experts, carried.dtype, layout, cut.axes)
        rows = carrier.experts(route, rows, own, moe.kernel, experts.activation_of(moe))
    with jax.named_scope("combine"):
        y = assignment.ungroup(gating.summed(carrier.combine(route, rows), moe).astype(x.dtype), moe, x.shape[1])
    sums |= carrier.sums(route)
    if plan.shards > 1 and kind.token_choice and isinstance(mine, Assignment):
        sums |= visits.sums(physical, plan)
    if moe.orthogonality:
        assert isinstance(mine, Assignment)
        sums |= specialise.sums(carrier, route, rows, mine.kept, plan.tokens)
    local = None
    if moe.zero_experts:
        assert isinstance(mine, Assignment)
        free = zero_experts.output(assignment.group(x, moe), mine, parameters.constants, moe)
        local = assignment.ungroup(free.astype(x.dtype), moe, x.shape[1])
    kept = jax.tree.map(lambda r: pieces.same(r, cut), replay.record(routed)) if mode.record else None
    return Result(y, local, jax.tree.map(lambda s: s[None], sums), kept)


def _sums_of_groups(seen: balancers.Seen, tokens: Tokens, moe: config.MoE, mode: Mode) -> Stats:
    """What is counted of whole groups: by the router's statistics, the balancers, the router itself, and for the report."""
    kind = routers.ROUTERS[moe.router]
    sums = stats.router_sums(seen) | balancers.sums(seen, moe)
    if kind.keeper is not None:
        sums |= kind.keeper.sums(seen.inputs, moe)
    if mode.label_kinds and not kind.soft:  # a soft slot has no token whose label it could count
        labels, width = assignment.group(tokens.labels, moe), seen.distribution.shape[-1]
        sums["labels"] = stats.label_table(seen.routed, labels, mode.label_kinds, width)
        sums["coactivation"] = stats.coactivation(seen.routed, seen.inputs.valid, width)
    return sums


def _plan(moe: config.MoE, kind: Router, layout: Layout, cut: Pieces, size: int, slots: int) -> Plan:
    """What the transport is told of a layer whose groups have `size` tokens and `slots` places an expert."""
    apart = moe.group_window is None and cut.number > 1
    return Plan(
        experts=moe.num_experts,
        capacity=moe.soft_slots if kind.soft else slots,
        shards=collectives.devices(sharding.axes(layout.expert)),
        tokens=(size // cut.number if apart else size) * gating.choices(moe),
        axis=sharding.axes(layout.expert),
        cut=cut.axes if apart else (),
        buffer=moe.receive_buffer,
        exchange=moe.exchange,
        by_token=kind.token_choice,
        classes=len(widths.of_classes(moe)),
    )
