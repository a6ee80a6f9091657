"""Channel parts: what works on each position alone, dense or sparse. Each returns its output and its sums."""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from moejax import config, sharding
from moejax.arrays import Stats
from moejax.kernels.grouped_mlp import Weights
from moejax.kernels.grouped_mlp.weights import swiglu
from moejax.layers import init
from moejax.layers.context import Context
from moejax.moe.layer import Mode, Parameters, sparse_layer


class SwiGLU(nnx.Module):
    """(silu(x @ gate) * (x @ up)) @ down (Shazeer 2020, eq. 6)."""

    def __init__(self, model: config.Model, hidden: int, *, rngs: nnx.Rngs):
        gain = (2 * model.repeats * len(model.pattern)) ** -0.5
        self.gate_up = init.normal(rngs, (model.width, 2, hidden), ("storage", None, "hidden"), fan_in=model.width)
        self.down = init.normal(rngs, (hidden, model.width), ("hidden", "storage"), fan_in=hidden, gain=gain)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        gate_up = sharding.gather(self.gate_up, x.dtype)
        h = jnp.einsum("btd,df->btf", x, gate_up.reshape(gate_up.shape[0], -1))
        return jnp.einsum("btf,fd->btd", swiglu(h), sharding.gather(self.down, x.dtype))


class Dense(nnx.Module):
    """The dense feed-forward layer."""

    def __init__(self, model: config.Model, *, rngs: nnx.Rngs):
        self.mlp = SwiGLU(model, model.hidden, rngs=rngs)

    def __call__(self, x: Array, context: Context, layer: Array, mode: Mode) -> tuple[Array, Stats]:
        return self.mlp(x), {}


class Sparse(nnx.Module):
    """Routed experts, and a shared one where the config has it."""

    def __init__(self, model: config.Model, *, rngs: nnx.Rngs):
        d, e, f = model.width, model.moe.num_experts, model.moe.hidden
        gain = (2 * model.repeats * len(model.pattern)) ** -0.5
        self.moe = model.moe
        self.router = init.normal(rngs, (d, e), ("storage", None), fan_in=d)
        gate_up_dims = ("expert", "expert_storage", None, "expert_hidden")
        self.gate_up = init.normal(rngs, (e, d, 2, f), gate_up_dims, fan_in=d)
        self.down = init.normal(rngs, (e, f, d), ("expert", "expert_hidden_storage", None), fan_in=f, gain=gain)
        self.shared = SwiGLU(model, model.moe.shared_hidden, rngs=rngs) if model.moe.shared_hidden else None

    def __call__(self, x: Array, context: Context, layer: Array, mode: Mode) -> tuple[Array, Stats]:
        parameters = Parameters(sharding.gather(self.router), Weights(self.gate_up[...], self.down[...]))
        y, stats = sparse_layer(x, context.tokens, parameters, context.key, layer, self.moe, mode)
        if self.shared is not None:
            y = y + self.shared(x)
        return y, stats
