"""Routing without a layer, for the batteries of balancers: logits -> sums, in the library and in the oracle."""

import functools

import harness
import jax
import jax.numpy as jnp
import numpy as np
import oracle

from moejax import config
from moejax.moe import assignment, balancers, routers, stats
from moejax.moe.records import Inputs, columns
from moejax.train import losses


class Routed:
    """A config's routing of [B, T] tokens, dropless, compiled once."""

    def __init__(self, moe: config.MoE):
        self.moe, self.kind = moe, routers.ROUTERS[moe.router]
        self.sums = harness.jit(self._sums)
        self._pull = harness.jit(self._pulled)

    def slope(self, objective, logits, valid, noise=None, spread=None):
        """The gradient of objective(sums) by the logits, and by the spread where there is one."""
        sums = self.sums(logits, valid, noise, spread)
        real = {name: s for name, s in sums.items() if jnp.issubdtype(s.dtype, jnp.floating)}
        found = self._pull(logits, spread, valid, noise, jax.grad(lambda real: objective(sums | real))(real))
        return [np.asarray(x) for x in found if x is not None]

    def _pulled(self, logits, spread, valid, noise, by_sums):
        def real(logits, spread):
            sums = self._sums(logits, valid, noise, spread)
            return {name: sums[name] for name in by_sums}

        return jax.vjp(real, logits, spread)[1](by_sums)

    def _sums(self, logits, valid, noise=None, spread=None, state=None):
        seen = self.seen(logits, valid, noise, spread, state)
        keeper = {} if self.kind.keeper is None else self.kind.keeper.sums(seen.inputs, self.moe)
        return stats.router_sums(seen) | balancers.sums(seen, self.moe) | keeper

    def seen(self, logits, valid, noise=None, spread=None, state=None):
        """What balancers see; `state` as at the start where it is not given."""

        def group(x):
            return None if x is None else assignment.group(jnp.asarray(x), self.moe)

        positions = valid.shape[1]
        where = jnp.broadcast_to(jnp.arange(positions, dtype=jnp.int32)[None], valid.shape)
        inputs = Inputs(
            group(logits), group(spread), group(valid), group(where), group(where), group(noise), None,
            start(self.moe) if state is None else state, jnp.int32(0), jnp.int32(0),
        )  # fmt: skip
        size = inputs.valid.shape[1]
        limit = jnp.sum(inputs.valid, axis=1, dtype=jnp.int32)
        routed = self.kind.assign(jax.tree.map(jax.lax.stop_gradient, inputs), limit, size, self.moe)
        placed = self.kind.weigh(inputs, routed, self.moe)
        return balancers.Seen(inputs, routed, placed, self.kind.distribution(inputs, self.moe), positions)


@functools.cache
def of(moe: config.MoE) -> Routed:
    return Routed(moe)


def start(moe):
    """The state of a layer before the first step."""
    keeper = routers.ROUTERS[moe.router].keeper
    return balancers.init(moe) | ({} if keeper is None else keeper.init(moe))


def problem(moe, rows=4, positions=6, seed=0):
    """(logits [B,T,X], valid [B,T], uniform noise [B,T,n] or None, spread [B,T,X] or None); row 1 has no valid token."""
    rng = np.random.default_rng(seed)
    shape, kind = (rows, positions, columns(moe)), routers.ROUTERS[moe.router]
    valid = rng.random(shape[:2]) < 0.8
    valid[1] = False
    draw = lambda: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    logits, spread = draw(), draw() if "spread" in kind.heads(moe) else None
    noise = rng.random((*shape[:2], kind.noise(moe))).astype(np.float32) if kind.noise(moe) else None
    return logits, valid, noise, spread


def expected(moe, logits, valid, noise=None, spread=None, bias=None):
    """The oracle's (spec, routing, sums) of the same."""
    spec = oracle.Spec(
        moe.num_experts, moe.top_k, moe.router, moe.score, moe.renormalize, group_rows=moe.group_rows,
        window=moe.group_window, zero=moe.zero_experts, zero_share=moe.zero_share, top_p=moe.top_p,
    )  # fmt: skip
    logits = np.asarray(logits, np.float64)
    draws = oracle.Draws(None if noise is None else np.asarray(noise, np.float64))
    routing = oracle.route(logits, valid, spec, draws, spread, bias=bias)
    return spec, routing, oracle.statistics(logits, valid, routing, spec, spread)


def objective(stacked, moe, routing=None):
    """The objective of layers without a task, and its parts."""
    sums = {"nats": jnp.float32(0), "targets": jnp.int32(1), "layers": {"sparse": stacked}}
    return losses.objective(sums, {"sparse": routing or {}}, config.Model(moe=moe))
