"""The routed experts' parameters: their shapes, how they lie on the mesh, and how a device has its own ready for use."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array

from moejax import collectives, config, sharding
from moejax.collectives import Axes
from moejax.kernels import activations
from moejax.kernels.activations import Activation
from moejax.kernels.grouped_mlp import Weights
from moejax.sharding import Layout


def activation_of(moe: config.MoE) -> Activation:
    return Activation(moe.activation, moe.activation_clamp)


def check(moe: config.MoE) -> None:
    activations.check(activation_of(moe))


def shapes(moe: config.MoE, experts: int, width: int, hidden: int) -> dict[str, tuple[int, ...]]:
    """Of every parameter that experts of one width have, by its name in Weights."""
    into, bias = (experts, width, hidden), (experts, hidden)
    found = {"up": into, "down": (experts, hidden, width)}
    if activation_of(moe).gated:
        found["gate"] = into
    if moe.expert_bias:
        found |= {f"{name}_bias": bias for name in ("up", "gate") if name in found} | {"down_bias": (experts, width)}
    return found


def dims(layout: Layout) -> dict[str, tuple[str | None, ...]]:
    """Names of the dimensions of every parameter: fsdp on the middle one of a matrix, never the last; biases are small and not cut
    over fsdp."""
    into, bias = (layout.expert, "expert_storage", layout.hidden), (layout.expert, layout.hidden)
    return {
        "up": into,
        "gate": into,
        "down": (layout.expert, layout.hidden_storage, None),
        "up_bias": bias,
        "gate_bias": bias,
        "down_bias": (layout.expert, None),
    }


def specs(layout: Layout, weights: Weights) -> Weights:
    """The PartitionSpec of every array of one width of experts."""
    present = {name for name, w in weights._asdict().items() if w is not None}
    return Weights(**{name: sharding.spec(*of) if name in present else None for name, of in dims(layout).items()})


def local(experts: tuple[Weights, ...], dtype: jnp.dtype, layout: Layout, positions: Axes) -> tuple[Weights, ...]:
    """This device's experts, whole: gathered over fsdp in fp32, so that gradients are reduced in fp32, then cast.

    Where a width is cut, its outputs are partial and summed, so one device of each has the last bias and the others zero."""
    hidden = sharding.axes(layout.hidden)

    def whole(w: Array) -> Array:
        own = collectives.vary(w, (*sharding.BATCH_AXES, *positions))
        gathered = own if w.ndim == 2 else collectives.all_gather(own, sharding.axes("expert_storage"), axis=1)
        return gathered.astype(dtype)

    def of_class(weights: Weights) -> Weights:
        mine = jax.tree.map(whole, weights)
        if mine.down_bias is None:
            return mine
        return mine._replace(down_bias=collectives.once(collectives.vary(mine.down_bias, hidden), hidden))

    return tuple(of_class(weights) for weights in experts)
