"""A skewed router left to a balancer alone: how many steps until the load is even."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from moejax import config
from moejax.arrays import Stats
from moejax.moe import balancers, diagnostics, routers, stats
from moejax.moe.records import Inputs, State, columns

GROUPS, SIZE, WIDTH = 128, 128, 64
"""16,384 tokens a step, in rows of 128, of width 64."""
EXPERTS, TOP_K = 64, 8
LEARNING_RATE = 6e-3
"""Of Adam on the router's weights, the default experiment's peak; biases are moved by their own rule."""
EVEN = 0.1
"""MaxVio below which the load counts as even."""


class Carried(NamedTuple):
    heads: dict[str, jax.Array]
    moments: Any
    state: State


def steps_until_even(moe: config.MoE, limit: int, seed: int = 0) -> tuple[int | None, list[float]]:
    """Updates until MaxVio of the requests is below EVEN (None: not in `limit`), and MaxVio before every update.

    Tokens are fresh normal vectors each step; a constant feature carries a Zipf skew of exponent 1 on the logits. There
    is no task: losses train the router's weights alone.
    """
    optimizer = optax.adam(LEARNING_RATE)
    heads = _heads(moe, seed)
    kind = routers.ROUTERS[moe.router]
    state = balancers.init(moe) | ({} if kind.keeper is None else kind.keeper.init(moe))
    now = Carried(heads, optimizer.init(heads), state)
    update = jax.jit(lambda now, key: _step(now, key, moe, optimizer))
    violations: list[float] = []
    for done in range(limit + 1):
        after, requests = update(now, jax.random.fold_in(jax.random.key(seed + 1), done))
        violations.append(float(diagnostics.max_violation(np.asarray(requests)[None], balancers.targets(moe))[0]))
        if violations[-1] < EVEN:
            return done, violations
        now = after
    return None, violations


def _heads(moe: config.MoE, seed: int) -> dict[str, jax.Array]:
    names = sorted(routers.ROUTERS[moe.router].heads(moe).items())
    heads = {
        name: jax.random.normal(jax.random.fold_in(jax.random.key(seed), i), (WIDTH, n)) / np.sqrt(WIDTH)
        for i, (name, n) in enumerate(names)
    }
    skew = -jnp.log(jnp.arange(1, columns(moe) + 1, dtype=jnp.float32))
    return heads | {"logits": heads["logits"].at[0].set(skew)}


def _step(now: Carried, key: jax.Array, moe: config.MoE, optimizer: Any) -> tuple[Carried, jax.Array]:
    def loss(heads: dict[str, jax.Array]) -> tuple[jax.Array, Stats]:
        sums = _sums(heads, now.state, key, moe)
        stacked = jax.tree.map(lambda s: s[None], sums)
        each = balancers.losses(stacked, jax.tree.map(lambda s: s[None], now.state), moe).values()
        return sum((jnp.sum(weight * value) for value, weight in each), jnp.float32(0)), sums

    slope, sums = jax.grad(loss, has_aux=True)(now.heads)
    updates, moments = optimizer.update(slope, now.moments)
    kind = routers.ROUTERS[moe.router]
    kept = {} if kind.keeper is None else kind.keeper.update(now.state, sums, moe)
    state = now.state | kept | balancers.update(now.state, sums, moe)
    return Carried(optax.apply_updates(now.heads, updates), moments, state), sums["requests"]


def _sums(heads: dict[str, jax.Array], state: State, key: jax.Array, moe: config.MoE) -> Stats:
    """The routing of one batch of fresh tokens, dropless, as named sums."""
    kind = routers.ROUTERS[moe.router]
    for_x, for_noise = jax.random.split(key)
    x = jax.random.normal(for_x, (GROUPS, SIZE, WIDTH)).at[..., 0].set(1.0)
    logits = {name: routers.logits(x, weight) for name, weight in heads.items()}
    whole = jnp.zeros((GROUPS, SIZE), jnp.int32)
    noise = jax.random.uniform(for_noise, (GROUPS, SIZE, kind.noise(moe))) if kind.noise(moe) else None
    valid = whole == 0
    inputs = Inputs(
        logits["logits"], logits.get("spread"), valid, whole, whole, noise, None, state, jnp.int32(0), jnp.int32(0)
    )
    limit = jnp.full(GROUPS, SIZE, jnp.int32)
    routed = kind.assign(jax.tree.map(jax.lax.stop_gradient, inputs), limit, SIZE, moe)
    seen = balancers.Seen(inputs, routed, kind.weigh(inputs, routed, moe), kind.distribution(inputs, moe), SIZE)
    kept = {} if kind.keeper is None else kind.keeper.sums(inputs, moe)
    return stats.router_sums(seen) | balancers.sums(seen, moe) | kept
