"""Channel parts: what works on each position alone, dense or sparse. Each returns its output and its sums."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from moejax import config, sharding
from moejax.kernels.activations import activated
from moejax.kernels.grouped_mlp import Weights
from moejax.layers import init
from moejax.layers.context import Context
from moejax.moe import experts, routers, widths, zero_experts
from moejax.moe.inputs import Mode, Moment
from moejax.moe.layer import Parameters, sparse_layer
from moejax.moe.records import State, columns
from moejax.moe.replay import Recorded

Outcome = dict[str, Any]
"""What a channel reports: `sums` with a leading shard axis, and `recorded` routing where it was asked for."""


class SwiGLU(nnx.Module):
    """(silu(x @ gate) * (x @ up)) @ down (Shazeer 2020, eq. 6)."""

    def __init__(self, model: config.Model, hidden: int, *, rngs: nnx.Rngs):
        gain = (2 * config.depth(model)) ** -0.5
        self.gate_up = init.normal(rngs, (model.width, 2, hidden), ("storage", None, "hidden"), fan_in=model.width)
        self.down = init.normal(rngs, (hidden, model.width), ("hidden", "storage"), fan_in=hidden, gain=gain)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        h = jnp.einsum("btd,dcf->btcf", x, sharding.gather(self.gate_up, x.dtype))
        out = sharding.spec("batch", "position", None)
        return jnp.einsum(
            "btf,fd->btd", activated(h[..., 0, :], h[..., 1, :]), sharding.gather(self.down, x.dtype), out_sharding=out
        )


class Side(NamedTuple):
    """What a channel takes and gives beside the residual stream."""

    state: State
    """Of this layer; empty where it keeps none."""
    recorded: Recorded | None
    """Routing to play back."""


class Dense(nnx.Module):
    """The dense feed-forward layer."""

    def __init__(self, model: config.Model, *, rngs: nnx.Rngs):
        self.mlp = SwiGLU(model, model.hidden, rngs=rngs)

    def __call__(self, x: Array, context: Context, layer: Array, mode: Mode, side: Side) -> tuple[Array, Outcome]:
        return self.mlp(x), {}


class Sparse(nnx.Module):
    """Routed experts of one or more widths, and around them what the config has: a latent width, zero-computation experts, a
    shared expert."""

    def __init__(self, model: config.Model, *, rngs: nnx.Rngs):
        moe, d, inner = model.moe, model.width, model.moe.latent or model.width
        gain = (2 * config.depth(model)) ** -0.5
        self.moe = moe
        heads = routers.ROUTERS[moe.router].heads(moe)
        self.router = nnx.Dict(
            {name: init.normal(rngs, (d, n), ("storage", None), fan_in=d, role="router") for name, n in heads.items()}
            | ({"logits_bias": init.zeros((columns(moe),), (None,))} if moe.router_bias else {})
        )
        classes = widths.of_classes(moe)
        e, last = moe.num_experts // len(classes), 1.0 if moe.latent else gain
        self.experts = nnx.List([nnx.Dict(self._experts(rngs, e, inner, f, last)) for f in classes])
        self.into = init.normal(rngs, (d, inner), ("storage", None), fan_in=d) if moe.latent else None
        self.out = init.normal(rngs, (inner, d), (None, "storage"), fan_in=inner, gain=gain) if moe.latent else None
        number = zero_experts.constants(moe)
        vectors = (number, d), (None, "storage")
        self.constants = init.normal(rngs, *vectors, fan_in=d, decay=False, role="embedding") if number else None
        self.shared = SwiGLU(model, moe.shared_hidden, rngs=rngs) if moe.shared_hidden else None
        gate = (d, 1), ("storage", None)
        self.shared_gate = init.normal(rngs, *gate, fan_in=d, role="router") if moe.shared_gate else None

    def _experts(self, rngs: nnx.Rngs, number: int, width: int, hidden: int, gain: float) -> dict:
        """The parameters of experts of one width: matrices normal, the last one scaled by `gain`; biases zero."""
        dims = experts.dims(sharding.LAYOUTS[self.moe.tensor])
        made = {}
        for name, shape in experts.shapes(self.moe, number, width, hidden).items():
            matrix = len(shape) == 3
            scale = (gain if name == "down" else 1.0) if matrix else 0.0
            role = ("expert_out" if name == "down" else "expert_in") if matrix else "vector"
            made[name] = init.normal(rngs, shape, dims[name], fan_in=shape[1], gain=scale, decay=matrix, role=role)
        return made

    def __call__(self, x: Array, context: Context, layer: Array, mode: Mode, side: Side) -> tuple[Array, Outcome]:
        weights = tuple(Weights(**{name: w[...] for name, w in own.items()}) for own in self.experts)
        heads = {name: sharding.whole(self.router[name]) for name in sorted(self.router)}
        constants = None if self.constants is None else sharding.whole(self.constants)
        z = None if self.into is None else jnp.einsum("btd,dl->btl", x, sharding.whole(self.into, x.dtype))
        moment = Moment(context.key, layer, context.step)
        parameters = Parameters(heads, weights, constants)
        result = sparse_layer(x, z, context.tokens, parameters, side.state, moment, self.moe, mode, side.recorded)
        y = result.routed
        if self.out is not None:
            y = jnp.einsum("btl,ld->btd", y, sharding.whole(self.out, y.dtype))
        if result.local is not None:
            y = y + result.local
        if self.shared is not None:
            with jax.named_scope("shared"):
                y = y + self._of_shared(x)
        recorded = {} if result.recorded is None else {"recorded": result.recorded}
        return y, {"sums": result.sums, **recorded}

    def _of_shared(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """The shared expert, times sigmoid(x . v) where it is gated (Qwen2-MoE 2024)."""
        assert self.shared is not None
        y = self.shared(x)
        if self.shared_gate is None:
            return y
        logit = jnp.einsum("btd,dn->btn", x.astype(jnp.float32), sharding.whole(self.shared_gate))
        return y * jax.nn.sigmoid(logit).astype(y.dtype)
