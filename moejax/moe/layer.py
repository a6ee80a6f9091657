"""The sparse layer, its stages in order: route, assign, dispatch, experts, combine, count. One shard_map around them."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moejax import config, sharding
from moejax.arrays import Stats
from moejax.errors import ConfigError
from moejax.kernels.grouped_matmul import pick
from moejax.kernels.grouped_mlp import Weights
from moejax.moe import assignment, balance, noise, router, stats, transport
from moejax.moe.transport.plan import Plan


@dataclasses.dataclass(frozen=True)
class Mode:
    """What differs between training and the kinds of evaluation; static."""

    training: bool
    """Noise is drawn."""
    capacity_factor: float | None
    """None is dropless."""
    label_kinds: int = 0
    """Kinds of labels to tabulate against experts; 0 for no table."""


class Tokens(NamedTuple):
    """What routing needs to know of the tokens beside their vectors."""

    valid: Bool[Array, "B T"]
    labels: Int[Array, "B T"]
    row_ids: Int[Array, " B"]


class Parameters(NamedTuple):
    router: Float[Array, "D E"]
    experts: Weights


def check(moe: config.MoE, context: int) -> None:
    """Every rule of the sparse layer that needs neither mesh nor batch."""
    for name in ("num_experts", "hidden"):
        if getattr(moe, name) < 1:
            raise ConfigError(f"model.moe.{name}={getattr(moe, name)}: at least 1")
    if moe.shared_hidden < 0:
        raise ConfigError(f"model.moe.shared_hidden={moe.shared_hidden}: a width, or 0 for no shared expert")
    router.check(moe)
    assignment.check(moe, context)
    transport.check(moe)
    balance.check(moe)
    pick(moe.kernel, platform="any")  # named, because asking for it would start the devices


def sparse_layer(
    x: Float[Array, "B T D"],
    tokens: Tokens,
    parameters: Parameters,
    key: Array,
    layer: Array,
    moe: config.MoE,
    mode: Mode,
) -> tuple[Float[Array, "B T D"], Stats]:
    """Routed experts' output for every valid token (zero for the rest), and this layer's sums with a leading shard axis.

    `key` is the step's noise key, `layer` the depth of this layer: together with a row's id they seed its noise.
    """
    rows, whole = sharding.spec("batch", "position"), sharding.spec()
    vectors = sharding.spec("batch", "position", None)
    weights = Weights(
        sharding.spec("expert", "expert_storage", None, "expert_hidden"),
        sharding.spec("expert", "expert_hidden_storage", None),
    )
    body = jax.shard_map(
        lambda x, tokens, parameters, key, layer: _on_shard(x, tokens, parameters, key, layer, moe, mode),
        in_specs=(vectors, Tokens(rows, rows, sharding.spec("batch")), Parameters(whole, weights), whole, whole),
        out_specs=(vectors, sharding.spec("shard")),
    )
    return body(x, tokens, parameters, key, layer)


def _on_shard(
    x: Array, tokens: Tokens, parameters: Parameters, key: Array, layer: Array, moe: config.MoE, mode: Mode
) -> tuple[Array, Stats]:
    """The whole layer on the rows of one shard; only `dispatch` and `combine` talk to other shards."""
    positions = x.shape[1]
    kind = router.ROUTERS[moe.router]
    random = mode.training and kind.random

    with jax.named_scope("route"):
        seen = x
        if mode.training and moe.jitter > 0:
            wiggle = noise.uniform(key, layer, tokens.row_ids, "jitter", *x.shape[1:])
            seen = router.jittered(x, wiggle, moe.jitter)
        drawn = noise.uniform(key, layer, tokens.row_ids, "router", positions) if random else None
        logits = assignment.group(router.logits(seen, parameters.router), moe)
        choice = kind.choose(logits, None if drawn is None else assignment.group(drawn, moe), moe)

    with jax.named_scope("assign"):
        valid = assignment.group(tokens.valid, moe)
        limit = assignment.capacity(
            mode.capacity_factor, moe.top_k, moe.num_experts, jnp.sum(valid, axis=1, dtype=jnp.int32)
        )
        placed = assignment.place(choice, valid, limit, moe.num_experts)

    with jax.named_scope("count"):
        sums = stats.router_sums(logits, choice, placed, valid)
        if mode.label_kinds:
            labels = assignment.group(tokens.labels, moe)
            sums["labels"] = stats.label_table(placed, labels, mode.label_kinds, moe.num_experts)

    size = valid.shape[1]
    slots = assignment.capacity(mode.capacity_factor, moe.top_k, moe.num_experts, size)
    plan = Plan(moe.num_experts, slots, jax.lax.axis_size(Plan.axis), size)
    carrier = transport.for_capacity(moe, mode.capacity_factor)
    with jax.named_scope("dispatch"):
        route = carrier.route(placed, plan)
        rows = carrier.dispatch(route, assignment.group(x, moe))
    with jax.named_scope("experts"):
        rows = carrier.experts(route, rows, _local_weights(parameters.experts, x.dtype), moe.kernel)
    with jax.named_scope("combine"):
        y = carrier.combine(route, rows).astype(x.dtype)
    return assignment.ungroup(y, moe, positions), jax.tree.map(lambda s: s[None], sums)


def _local_weights(weights: Weights, dtype: jnp.dtype) -> Weights:
    """This device's experts, whole: gathered over fsdp in fp32, so that gradients are reduced in fp32, then cast."""

    def whole(w: Array) -> Array:
        w = sharding.vary(w)
        return sharding.all_gather(w, sharding.STORAGE_AXIS, axis=1).astype(dtype)

    return jax.tree.map(whole, weights)
