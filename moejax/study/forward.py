"""One compiled forward pass for a whole study: -log p and routing of every token, with experts forbidden or silenced as arguments.

Forbidden: no token may choose the expert, and gates are what the router makes of the others. Silenced: chosen as ever, and its output
is zero.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from moejax import config, sharding
from moejax.arrays import Batch
from moejax.errors import UserError
from moejax.layers import kinds
from moejax.models import depth
from moejax.models.decoder import Decoder
from moejax.moe import routers
from moejax.moe.inputs import Mode
from moejax.moe.records import columns
from moejax.moe.replay import Recorded
from moejax.moe.routers import fixed
from moejax.train import step
from moejax.train.state import Built, TrainState, build

FORBIDDEN = -1e9
"""Added to the logit and to the selection biases: a score of 0, chosen only where there is nothing else, and then with a gate of 0."""


class Edit(NamedTuple):
    """What is changed in the sparse layers, L of them in order of depth."""

    kept: Float[np.ndarray | Array, "*L E"]
    """A factor on the output of every expert."""
    bias: Float[np.ndarray | Array, "*L X"]
    """Added to logits and selection biases; X counts zero-computation experts too."""


def nothing(model: config.Model) -> Edit:
    """Every expert as it is."""
    layers = kinds.number(model, "sparse")
    kept, bias = (layers, model.moe.num_experts), (layers, columns(model.moe))
    return Edit(np.ones(kept, np.float32), np.zeros(bias, np.float32))


def silenced(model: config.Model, layer: int, expert: int) -> Edit:
    edit = nothing(model)
    edit.kept[layer, expert] = 0
    return edit


def forbidden(model: config.Model, layer: int, expert: int) -> Edit:
    edit = nothing(model)
    edit.bias[layer, expert] = FORBIDDEN
    return edit


def require_forbidding(moe: config.MoE) -> None:
    """Raises UserError where a lower logit does not keep tokens from an expert."""
    if routers.ROUTERS[moe.router] in (fixed.HASH, fixed.RANDOM) or moe.sinkhorn:
        raise UserError(
            f"--ablate=forbidden with model.moe.router={moe.router}, sinkhorn={moe.sinkhorn}: its choices do not follow logits, so none "
            f"can be forbidden; give --ablate=silenced"
        )


Forward = Callable[[TrainState, Batch, Edit], tuple[Float[Array, "B T"], Recorded]]


def make(built: Built, state: TrainState) -> Forward:
    """(state, batch, edit) -> -log p of every target in nats, and the routing [layers, ...], whole on every device; dropless."""
    model = built.config.model
    kind = routers.ROUTERS[model.moe.router]
    biased = "logits" in kind.heads(model.moe)
    dropless = model.moe.capacity_factor if kind.bounded else None
    mode = Mode(training=False, capacity_factor=dropless, record=True)
    open_to = build(_with_bias(built.config), built.mesh) if biased else built

    def forward(state: TrainState, batch: Batch, edit: Edit) -> tuple[Array, Recorded]:
        parameters = edited(state.parameters, edit, model, biased)
        found = step.nats_of(open_to, parameters, batch, step.still(_shifted(state, edit)), mode)
        return found.nats, found.outcomes["sparse"]["recorded"]

    where, whole = jax.tree.map(lambda x: x.sharding, state), sharding.replicated(built.mesh)
    return jax.jit(forward, in_shardings=(where, step.batch_shardings(built), whole), out_shardings=whole)


def make_inputs(built: Built, state: TrainState) -> Callable[[TrainState, Batch], tuple[Array, Array]]:
    """(state, batch) -> the vectors [L, B, T, D] that each sparse layer is given, and which [B, T] are valid; whole on every device."""
    moe = built.config.model.moe
    dropless = moe.capacity_factor if routers.ROUTERS[moe.router].bounded else None
    watching = Watching(*(getattr(built, f.name) for f in dataclasses.fields(built)))

    def inputs(state: TrainState, batch: Batch) -> tuple[Array, Array]:
        found = step.nats_of(watching, state.parameters, batch, step.still(state), Mode(False, dropless))
        return found.outcomes["sparse"]["input"], batch.valid

    where, whole = jax.tree.map(lambda x: x.sharding, state), sharding.replicated(built.mesh)
    return jax.jit(inputs, in_shardings=(where, step.batch_shardings(built)), out_shardings=(whole, whole))


class Watching(Built):
    """Its models report what their sparse layers are given."""

    def model(self, parameters: Any) -> Decoder:
        model = super().model(parameters)
        for layer in (*model.first, *model.blocks.layers, *(module.layer for module in model.further)):
            layer.channel = Watched(layer.channel)
        return model


class Watched(nnx.Module):
    """A channel whose outcome has its input."""

    def __init__(self, channel: nnx.Module):
        self.channel = channel

    def __call__(self, x: Array, *rest: Any) -> tuple[Array, Any]:
        y, outcome = self.channel(x, *rest)
        return y, outcome | {"input": x} if outcome else outcome


def edited(parameters: Any, edit: Edit, model: config.Model, biased: bool) -> Any:
    """The parameters with the edit in them: outputs times `kept`, exactly; with `biased` routers that have a bias."""
    new = jax.tree.map(lambda x: x, parameters)
    parts = depth.parted(model, {"sparse": edit})
    layers = [(new["first"], parts.first)] if parts.first else []
    layers += [(new["blocks"]["layers"], parts.blocks)]
    layers += [({i: m["layer"] for i, m in new["further"].items()}, parts.further)] if parts.further else []
    for holder, edits in layers:
        for i, own in enumerate(edits):
            if own is not None:
                _edit(holder[i]["channel"], own, biased)
    return new


def _edit(channel: dict[str, Any], edit: Edit, biased: bool) -> None:
    classes = channel["experts"]
    for (_, weights), kept in zip(sorted(classes.items()), jnp.split(edit.kept, len(classes), axis=-1), strict=True):
        weights["down"] = weights["down"] * kept[..., None, None]
        if "down_bias" in weights:
            weights["down_bias"] = weights["down_bias"] * kept[..., None]
    if biased:
        own = channel["router"].get("logits_bias")
        channel["router"]["logits_bias"] = edit.bias if own is None else own + edit.bias


def _shifted(state: TrainState, edit: Edit) -> TrainState:
    """Selection biases with the edit's."""
    sparse = {k: v + edit.bias if k.endswith("_bias") else v for k, v in state.routing["sparse"].items()}
    return dataclasses.replace(state, routing=state.routing | {"sparse": sparse})


def _with_bias(cfg: config.Config) -> config.Config:
    moe = dataclasses.replace(cfg.model.moe, router_bias=True)
    return dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, moe=moe))
