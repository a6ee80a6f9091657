"""Losses that even out the load: load balance (global, microbatch, group, sequence), importance, expected load."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.scipy.stats import norm
from jaxtyping import Array, Float

from moejax import config
from moejax.arrays import SoftAssignment, Stats, count
from moejax.errors import ConfigError
from moejax.moe.balancers.api import Balancer, Seen, share, targets
from moejax.moe.names import ASSIGNMENT, keep
from moejax.moe.records import State
from moejax.moe.scores import at, noisy_logits

SCOPES = ("global", "microbatch", "group", "sequence")
OVERFLOW_AT = 1.25
"""Multiple of the fair share past which requests overflow, for the adaptive weight."""
ADAPT, ADAPT_LIMIT = 1.02, 64.0
"""Factor of the adaptive weight a step, and its bounds 1 / limit to limit."""


def load_balance(stats: Stats, moe: config.MoE) -> Float[Array, ""]:
    """sum_e f_e P_e / t_e, with f_e the share of all requests (every choice), P_e the mean probability and t_e the target
    share, 1 / E unless zero-computation experts have their own: 1 at perfect balance for every k (Fedus et al. 2021,
    eq. 4, over all k choices). f has no gradient. Narrower scopes are means over their parts."""
    if "parts" in stats:
        return share(stats["part_balance"], stats["parts"])
    asked = jnp.sum(stats["requests"], dtype=jnp.int32)
    return jnp.sum(share(stats["requests"], asked) * share(stats["probability"], stats["tokens"]) / targets(moe))


def over_microbatch(stats: Stats, moe: config.MoE) -> Stats:
    """The sums of a microbatch, with its own load-balance loss among them where that is the scope."""
    if moe.load_balance_scope != "microbatch" or not moe.load_balance:
        return stats
    loss = jax.vmap(lambda s: load_balance(s, moe))(stats)
    return stats | {"part_balance": loss, "parts": jnp.any(stats["requests"] > 0, axis=-1).astype(jnp.int32)}


def _part_sums(seen: Seen, moe: config.MoE) -> Stats:
    """Of the scopes group and sequence: the sum of the parts' losses and the number of parts that ask for anything."""
    if moe.load_balance_scope not in ("group", "sequence"):
        return {}
    valid, routed, shape = seen.inputs.valid, seen.routed, seen.distribution.shape[1:]

    def by_token(token: Array, expert: Array, asked: Array) -> Array:
        return jnp.zeros_like(expert, shape=shape).at[token, expert].add(asked.astype(jnp.int32))

    requests = jax.vmap(by_token)(routed.token, routed.original, routed.asked)
    probability = jnp.where(valid[..., None], seen.distribution, 0)
    part = _part_of(seen, moe)
    f, p, tokens = (_by_part(x, part) for x in (requests, probability, valid[..., None].astype(jnp.int32)))
    fraction = share(f, jnp.sum(f, axis=-1, keepdims=True, dtype=jnp.int32))
    losses = jnp.sum(fraction * share(p, tokens) / targets(moe)[None], axis=-1)
    return {"part_balance": jnp.sum(losses), "parts": count(jnp.any(f > 0, axis=-1))}


def _part_of(seen: Seen, moe: config.MoE) -> tuple[int, int]:
    """How groups [G, S] are cut or joined into parts: (parts in a group, groups in a part)."""
    if moe.load_balance_scope == "group":
        return 1, 1
    windows = 1 if moe.group_window is None else seen.context // moe.group_window
    return moe.group_rows, windows


def _by_part(x: Array, part: tuple[int, int]) -> Array:
    """[G, S, n] -> [parts, n], summed. Rows that share a group are interleaved by position; windows of a row are adjacent groups."""
    rows, windows = part
    groups, size, width = x.shape
    inner = jnp.sum(x.reshape(groups, size // rows, rows, width), axis=1, dtype=x.dtype)
    return jnp.sum(inner.reshape(groups * rows // windows, windows, width), axis=1, dtype=x.dtype)


def variation(amount: Float[Array, " X"], moe: config.MoE) -> Float[Array, ""]:
    """Squared coefficient of variation of amounts over their targets: 0 at balance (Shazeer et al. 2017, eq. 7)."""
    relative = amount / targets(moe)
    mean = jnp.mean(relative)
    return jnp.mean(jnp.square(relative - mean)) / jnp.where(mean == 0, 1, jnp.square(mean))


def importance_sums(seen: Seen, moe: config.MoE) -> Stats:
    """Gates summed by expert (Shazeer et al. 2017, eq. 6)."""
    if isinstance(seen.assignment, SoftAssignment):
        return {"importance": jnp.sum(seen.assignment.combine, axis=(0, 1, 3))}
    routed = seen.routed
    gate = jnp.where(routed.asked, seen.assignment.gate, 0)
    empty = jnp.zeros_like(gate, shape=seen.distribution.shape[-1])
    return {"importance": empty.at[routed.expert].add(gate)}


def expected_load_sums(seen: Seen, moe: config.MoE) -> Stats:
    """Probability of each expert to be among the k best if its own noise alone were drawn again (Shazeer et al. 2017, eq. 8 to
    10), under the biases and limits of this selection."""
    inputs, width = seen.inputs, seen.distribution.shape[-1]
    if inputs.noise is None:
        return {"expected_load": jnp.zeros_like(inputs.logits, shape=width)}
    noisy, preference = noisy_logits(inputs), seen.routed.preference
    assert inputs.spread is not None and preference is not None
    eligible = preference > -jnp.inf
    shift = jax.lax.stop_gradient(jnp.where(eligible, preference - noisy, 0))
    bar = boundary(jnp.where(eligible, noisy + shift, -jnp.inf), moe.top_k)
    rivals = jnp.isfinite(bar)
    distance = (inputs.logits + shift - jnp.where(rivals, bar, 0)) / jax.nn.softplus(inputs.spread)
    chances = jnp.where(eligible, jnp.where(rivals, _normal(distance), 1), 0)
    return {"expected_load": jnp.sum(jnp.where(inputs.valid[..., None], chances, 0), axis=(0, 1))}


@jax.custom_jvp
def _normal(x: Array) -> Array:
    """The standard normal distribution function. Its derivative is written out: jax 0.12 has none for erf inside shard_map."""
    return norm.cdf(x)


_normal.defjvps(lambda dx, _, x: dx * norm.pdf(x))


def boundary(scores: Float[Array, "G S X"], k: int) -> Float[Array, "G S X"]:
    """The score that each expert competes with: the k-th best of the others."""
    expert = keep(jax.lax.top_k(jax.lax.stop_gradient(scores), min(k + 1, scores.shape[-1]))[1], ASSIGNMENT)
    value = at(scores, expert)
    chosen = jnp.any(jax.nn.one_hot(expert[..., :k], scores.shape[-1], dtype=bool), axis=-2)
    after = value[..., k:] if value.shape[-1] > k else jnp.full_like(value[..., :1], -jnp.inf)
    return jnp.where(chosen, after, value[..., k - 1 : k])


def _adapt(state: State, stats: Stats, moe: config.MoE) -> State:
    """The weight grows in a step whose overflow exceeds the target, and shrinks in any other."""
    if not moe.load_balance_overflow:
        return {}
    requests = stats["requests"].astype(jnp.float32)
    fair = targets(moe) * jnp.sum(requests)
    overflow = jnp.sum(jnp.maximum(requests - OVERFLOW_AT * fair, 0)) / jnp.maximum(jnp.sum(requests), 1)
    factor = jnp.where(overflow > moe.load_balance_overflow, ADAPT, 1 / ADAPT)
    weight = jnp.clip(state["load_balance_weight"] * factor, 1 / ADAPT_LIMIT, ADAPT_LIMIT)
    return {"load_balance_weight": jnp.where(stats["tokens"] > 0, weight, state["load_balance_weight"])}


def _start(moe: config.MoE) -> State:
    return {"load_balance_weight": jnp.float32(1)} if moe.load_balance_overflow else {}


def _check(moe: config.MoE) -> None:
    if moe.load_balance_scope not in SCOPES:
        raise ConfigError(
            f"model.moe.load_balance_scope={moe.load_balance_scope!r} is not a scope; choose one of {', '.join(SCOPES)}"
        )
    if not 0 <= moe.load_balance_overflow < 1:
        raise ConfigError(f"model.moe.load_balance_overflow={moe.load_balance_overflow}: a share in [0, 1); set 0.02")
    for name in ("load_balance_overflow", "load_balance_scope"):
        if not moe.load_balance and getattr(moe, name) != getattr(config.MoE, name):
            raise ConfigError(
                f"model.moe.{name}={getattr(moe, name)} with load_balance=0: set model.moe.load_balance=0.01"
            )


def _check_smooth(moe: config.MoE) -> None:
    if moe.smooth_load and moe.sinkhorn:
        raise ConfigError(
            f"model.moe.smooth_load={moe.smooth_load} with sinkhorn={moe.sinkhorn}: the expected load is that of noise on one score, "
            f"and the scaling mixes all; set smooth_load=0 or sinkhorn=0"
        )


LOAD_BALANCE = Balancer(
    load_balance, weight="load_balance_weight", sums=_part_sums, init=_start, update=_adapt, check=_check
)
IMPORTANCE = Balancer(lambda stats, moe: variation(stats["importance"], moe), sums=importance_sums)
SMOOTH_LOAD = Balancer(
    lambda stats, moe: variation(stats["expected_load"], moe), sums=expected_load_sums, check=_check_smooth
)
