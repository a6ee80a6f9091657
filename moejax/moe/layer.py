"""The sparse layer, its stages in order: route, assign, weigh, count, dispatch, experts, combine. One shard_map around them."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moejax import config, sharding
from moejax.arrays import Assignment, Stats
from moejax.errors import ConfigError
from moejax.kernels.grouped_matmul import pick
from moejax.kernels.grouped_mlp import Weights
from moejax.moe import (
    assignment,
    balancers,
    noise,
    places,
    replay,
    routers,
    specialise,
    stats,
    transport,
    widths,
    zero_experts,
)
from moejax.moe.records import Inputs, State, columns
from moejax.moe.replay import Recorded
from moejax.moe.transport.plan import Plan


@dataclasses.dataclass(frozen=True)
class Mode:
    """What differs between training and the kinds of evaluation; static."""

    training: bool
    """Noise is drawn."""
    capacity_factor: float | None
    """None is dropless."""
    label_kinds: int = 0
    """Kinds of labels to tabulate against experts, and experts against each other; 0 for no table."""
    record: bool = False
    """Return the integers of routing as well."""


class Tokens(NamedTuple):
    """What routing needs to know of the tokens beside their vectors."""

    valid: Bool[Array, "B T"]
    labels: Int[Array, "B T"]
    row_ids: Int[Array, " B"]
    ids: Int[Array, "B T"]
    """Vocabulary ids, for routers that hash them."""


class Parameters(NamedTuple):
    router: dict[str, Array]
    """f32[D, columns] of every head of the router."""
    experts: tuple[Weights, ...]
    """One for each width of experts."""
    constants: Float[Array, "n D"] | None = None
    """Vectors of the constant zero-computation experts."""


class Moment(NamedTuple):
    """When and where a layer runs: together with a row's id this seeds its noise."""

    key: Array
    """The step's noise key."""
    layer: Int[Array, ""]
    """Depth of the layer."""
    step: Int[Array, ""]
    """Updates made."""


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
    if moe.activation_clamp is not None and not moe.activation_clamp > 0:
        raise ConfigError(
            f"model.moe.activation_clamp={moe.activation_clamp}: above 0 (gpt-oss uses 7), or null for none"
        )
    if not 0 <= moe.alarm_share < 1:
        raise ConfigError(f"model.moe.alarm_share={moe.alarm_share}: a share in [0, 1); set 0.1")
    widths.check(moe)
    zero_experts.check(moe)
    routers.check(moe)
    assignment.check(moe, context)
    places.check(moe)
    transport.check(moe, routers.ROUTERS[moe.router])
    balancers.check(moe)
    specialise.check(moe, routers.ROUTERS[moe.router])
    pick(moe.kernel, platform="any")  # named, because asking for it would start the devices


def sparse_layer(
    x: Float[Array, "B T D"],
    z: Float[Array, "B T L"],
    tokens: Tokens,
    parameters: Parameters,
    state: State,
    moment: Moment,
    moe: config.MoE,
    mode: Mode,
    recorded: Recorded | None = None,
) -> Result:
    """Routes by x and runs the experts on z (x itself, or its projection where experts are latent).

    `state` is this layer's, `recorded` plays its routing back.
    """
    rows, whole = sharding.spec("batch", "position"), sharding.spec()
    vectors, groups = sharding.spec("batch", "position", None), sharding.spec("batch")
    weights = Weights(
        sharding.spec("expert", "expert_storage", None, "expert_hidden"),
        sharding.spec("expert", "expert_hidden_storage", None),
    )
    body = jax.shard_map(
        lambda *arguments: _on_shard(*arguments, moe=moe, mode=mode),
        in_specs=(
            vectors,
            vectors,
            Tokens(rows, rows, groups, rows),
            Parameters(whole, (weights,) * len(parameters.experts), whole),
            whole,
            whole,
            groups,
        ),
        out_specs=Result(vectors, vectors, sharding.spec("shard"), groups),
    )
    return body(x, z, tokens, parameters, state, moment, recorded)


def _on_shard(
    x: Array,
    z: Array,
    tokens: Tokens,
    parameters: Parameters,
    state: State,
    moment: Moment,
    recorded: Recorded | None,
    *,
    moe: config.MoE,
    mode: Mode,
) -> Result:
    """The whole layer on the rows of one shard; only `dispatch` and `combine` talk to other shards."""
    positions = x.shape[1]
    kind = routers.ROUTERS[moe.router]
    with jax.named_scope("route"):
        inputs = _inputs(x, tokens, parameters.router, state, moment, moe, mode)
        size = inputs.valid.shape[1]
        slots = assignment.capacity(mode.capacity_factor, moe.top_k, moe.num_experts, size)
        limit = assignment.capacity(
            mode.capacity_factor, moe.top_k, moe.num_experts, jnp.sum(inputs.valid, axis=1, dtype=jnp.int32)
        )
        routed = kind.assign(jax.tree.map(jax.lax.stop_gradient, inputs), limit, slots, moe)
        routed, mismatch = (routed, {}) if recorded is None else replay.play(recorded, routed)
        placed = kind.weigh(inputs, routed, moe)

    with jax.named_scope("count"):
        seen = balancers.Seen(inputs, routed, placed, kind.distribution(inputs, moe), positions)
        sums = stats.router_sums(seen) | balancers.sums(seen, moe) | mismatch
        if kind.keeper is not None:
            sums |= kind.keeper.sums(inputs, moe)
        if mode.label_kinds and not kind.soft:  # a soft slot has no token whose label it could count
            labels, width = assignment.group(tokens.labels, moe), seen.distribution.shape[-1]
            sums["labels"] = stats.label_table(routed, labels, mode.label_kinds, width)
            sums["coactivation"] = stats.coactivation(routed, inputs.valid, width)

    shards = jax.lax.axis_size(Plan.axis)
    plan = Plan(
        moe.num_experts,
        moe.soft_slots if kind.soft else slots,
        shards,
        size,
        moe.receive_buffer,
        moe.exchange,
        len(parameters.experts),
    )
    carrier = transport.of(moe, kind, mode.capacity_factor)
    with jax.named_scope("dispatch"):
        route = carrier.route(widths.physical(placed, plan), plan)
        rows = carrier.dispatch(route, assignment.group(z, moe))
    with jax.named_scope("experts"):
        rows = carrier.experts(
            route, rows, _local_weights(parameters.experts, z.dtype), moe.kernel, moe.activation_clamp
        )
    with jax.named_scope("combine"):
        y = assignment.ungroup(carrier.combine(route, rows).astype(x.dtype), moe, positions)
    sums |= carrier.sums(route)
    if moe.orthogonality:
        sums |= specialise.sums(carrier, route, rows, routed, inputs.valid)
    local = None
    if moe.zero_experts:
        assert isinstance(placed, Assignment)
        free = zero_experts.output(assignment.group(x, moe), placed, parameters.constants, moe)
        local = assignment.ungroup(free.astype(x.dtype), moe, positions)
    kept = replay.record(routed) if mode.record else None
    return Result(y, local, jax.tree.map(lambda s: s[None], sums), kept)


def _inputs(
    x: Array,
    tokens: Tokens,
    heads: dict[str, Array],
    state: State,
    moment: Moment,
    moe: config.MoE,
    mode: Mode,
) -> Inputs:
    """What the router sees of a shard's rows: logits, noise and masks, in groups."""
    positions, kind = x.shape[1], routers.ROUTERS[moe.router]

    def draw(use: str, *shape: int) -> Array:
        return noise.uniform(moment.key, moment.layer, tokens.row_ids, use, *shape)

    def in_groups(rows: Array | None) -> Array | None:
        return None if rows is None else assignment.group(rows, moe)

    seen = x
    if mode.training and moe.jitter > 0:
        seen = routers.jittered(x, draw("jitter", *x.shape[1:]), moe.jitter)
    logits = {name: assignment.group(routers.logits(seen, weight), moe) for name, weight in heads.items()}
    drawn, hidden = None, None
    if kind.noise(moe) and (mode.training or kind.always_random):
        drawn = draw("router", positions, kind.noise(moe))
    if mode.training and moe.router_dropout > 0:
        hidden = draw("dropout", positions, columns(moe)) < moe.router_dropout
    where = jnp.broadcast_to(jnp.arange(positions, dtype=jnp.int32)[None], tokens.ids.shape)
    valid = assignment.group(tokens.valid, moe)
    nothing = jnp.zeros_like(valid, shape=(*valid.shape, columns(moe)), dtype=jnp.float32)
    return Inputs(
        logits=logits.get("logits", nothing),
        spread=logits.get("spread"),
        valid=valid,
        ids=assignment.group(tokens.ids, moe),
        position=assignment.group(where, moe),
        noise=in_groups(drawn),
        hidden=in_groups(hidden),
        state=state,
        layer=moment.layer,
        step=moment.step,
    )


def _local_weights(experts: tuple[Weights, ...], dtype: jnp.dtype) -> tuple[Weights, ...]:
    """This device's experts, whole: gathered over fsdp in fp32, so that gradients are reduced in fp32, then cast."""

    def whole(w: Array) -> Array:
        # Three dimensions: of four, the compiler reduces the gradient whole on every device and cuts afterwards.
        flat = sharding.vary(w).reshape(*w.shape[:2], -1)
        gathered = sharding.all_gather(flat, sharding.STORAGE_AXIS, axis=1)
        return gathered.reshape(w.shape[0], -1, *w.shape[2:]).astype(dtype)

    return jax.tree.map(whole, experts)
