"""What a training step sends and computes on a mesh, counted from shapes: rows of collectives as a compiled program has them.

Counted are weights gathered where they are used, sums of their gradients, vectors of tokens from where they are looked up, rows to experts
and back, sums over cut heads and widths, keys and values over cut positions. Sums of scalars, exchanges of integers and routers' logits
are small and left out.
"""

from __future__ import annotations

import functools
import math

import jax.numpy as jnp

from moejax import config, sharding
from moejax.layers import kinds
from moejax.plan import account, exchange, memory, roofline
from moejax.plan.account import Account
from moejax.plan.exchange import Row, row

AGAIN = ("exchanged", "full")
"""Policies under which the backward pass makes everything of a layer again; `selective` makes what no matrix product makes."""
TABLES = ("embedding", "unembedding")
"""Parameters outside the layers, of which no device ever has the whole."""


def rows(cfg: config.Config) -> list[Row]:
    """Collectives of one training step on one device."""
    found = [r for x in memory.weights(cfg.model) for r in _parameter(x, cfg)]
    layers = kinds.number(cfg.model, "sparse")
    found += [_times(r, layers * cfg.train.microbatches) for r in exchange.of_layer(cfg, "train") if layers]
    found += [_times(r, cfg.train.microbatches) for r in (*_tables(cfg), *_widths(cfg), *_positions(cfg))]
    return [r for r in found if r["devices"] > 1 and r["times"]]


@functools.cache
def gathered(x: memory.Lying) -> tuple[str, ...]:
    """Mesh axes that a parameter is gathered over where it is used."""
    stored = sharding.axes("expert_storage" if x.routed else "storage")
    return tuple(axis for axis in stored if any(axis in cut for cut in x.axes))


@functools.cache
def whole(x: memory.Lying) -> memory.Lying:
    """The same parameter where it is used."""
    over = gathered(x)
    return x._replace(axes=tuple(tuple(axis for axis in cut if axis not in over) for cut in x.axes))


def uses_of(x: memory.Lying, cfg: config.Config) -> int:
    """How often a microbatch gathers a parameter: in forward passes, and again in the backward pass unless all of a layer is saved. The
    embedding never; the unembedding for every loss, again backward whatever is saved; what joins a further token is outside layers."""
    passes = exchange.forward_passes(cfg, "train")
    if x.path[0] in TABLES:
        return (passes + 1) * _losses(cfg) if x.path[0] == TABLES[1] else 0
    return passes + (cfg.model.remat != "none" and "join" not in x.path)


def used(x: memory.Lying, cfg: config.Config) -> str:
    """The type in which a parameter is gathered: the TPU compiler casts first; routers compute in their own."""
    return x.dtype if "router" in x.path else cfg.model.compute_dtype


def executed_flops(counted: Account, cfg: config.Config) -> float:
    """Of all devices in one training step: the model's, masked scores, empty places of buffers, and what the backward pass makes again,
    rows that pad the batch included. Routers and padding within kernels are not."""
    model, forward = cfg.model, roofline.model_flops(counted, cfg, "train") / 3
    masked = roofline.masked_flops(counted, cfg, "train") / 3
    again = _weights(counted, "unembedding") * roofline.tokens(cfg, "train")  # chunks of the loss
    if model.remat in AGAIN:
        again += forward + masked - again
    elif model.remat == "selective":  # experts' kernels are not among the products that it saves
        again += roofline.expert_flops(counted, cfg, "train") / 3
    if chunked(cfg):
        again += masked + roofline.tokens(cfg, "train") * account.score_flops(counted, cfg.data.context)
    again += (exchange.forward_passes(cfg, "train") - 1) * (forward + masked)
    padding = memory.rows(cfg) / cfg.data.batch
    return padding * (3 * forward + 3 * masked + again + roofline.buffer_flops(counted, cfg, "train"))


def chunked(cfg: config.Config) -> bool:
    """Whether scores of some queries exist at a time, which the backward pass makes again."""
    return 0 < cfg.model.query_chunk < positions(cfg)


def positions(cfg: config.Config) -> int:
    """Of a row, that a device attends from."""
    return cfg.data.context // memory.devices(cfg.mesh, sharding.axes("position"))


def _weights(counted: Account, name: str) -> float:
    return 2.0 * sum(part.multiplied for part in counted.parts if part.name == name)


def _parameter(x: memory.Lying, cfg: config.Config) -> list[Row]:
    """Gathered before use, axis by axis, the last one first. Gradients go back the same way in fp32, each device keeping its piece, and the
    pieces are summed over the axes that they are alike on: `sharding.joined`, and moe/experts.py for those of experts. The unembedding is
    used with its columns cut over `tensor` and stored with all of them, which its gradient is gathered for."""
    name, micro, own = x.path[0], cfg.train.microbatches, math.prod(x.local(cfg.mesh))
    columns = memory.devices(cfg.mesh, sharding.axes("vocabulary")) if name == "unembedding" else 1
    sums = micro * (_losses(cfg) if name in TABLES else 1)
    found, piece = [], own // columns
    for axis in reversed(gathered(x) if name != "embedding" else ()):
        piece *= getattr(cfg.mesh, axis)
        found.append(row("all-gather", (axis,), cfg, memory.plain((piece,), used(x, cfg)), micro * uses_of(x, cfg)))
        found.append(row("reduce-scatter", (axis,), cfg, memory.plain((piece,), x.dtype), sums))
    alike = tuple(axis for axis in sharding.axes("shard") if not any(axis in cut for cut in x.axes))
    found.append(row("all-reduce", alike, cfg, memory.plain((own // columns,), x.dtype), sums))
    if columns > 1:
        found.append(row("all-gather", sharding.axes("vocabulary"), cfg, memory.plain((own,), x.dtype), micro))
    return found


def _tables(cfg: config.Config) -> list[Row]:
    """Vectors of tokens in one microbatch from where their columns are looked up, and their gradients back there."""
    looks = (exchange.forward_passes(cfg, "train") + 1) * _losses(cfg)
    return [row("all-to-all", sharding.axes("storage"), cfg, _vectors(cfg), looks)]


def _widths(cfg: config.Config) -> list[Row]:
    """Sums over what `tensor` cuts, in one microbatch: outputs of mixers and dense channels forward, gradients of their inputs backward;
    outputs of experts in fp32 and gradients of theirs, or tokens where it cuts the set of experts; the gradient of the loss, once."""
    model, axes = cfg.model, sharding.axes("heads")
    vectors, dense, sparse = _vectors(cfg), kinds.number(model, "dense"), kinds.number(model, "sparse")
    passes, blocks = exchange.forward_passes(cfg, "train"), dense + sparse * bool(model.moe.shared_hidden)
    sums = _layers(cfg) * (passes + 1 + (model.remat in AGAIN)) + blocks * (passes + 1) + _losses(cfg)
    found = [row("all-reduce", axes, cfg, vectors, sums)]
    if sharding.LAYOUTS[model.moe.tensor].hidden is None:
        return [*found, row("all-gather", axes, cfg, vectors, (passes + 1) * sparse)]
    routed = _tokens(cfg) * (model.moe.latent or model.width)
    back = row("all-reduce", axes, cfg, routed * jnp.dtype(model.compute_dtype).itemsize, sparse)
    return [*found, row("all-reduce", axes, cfg, routed * 4, passes * sparse), back]


def _positions(cfg: config.Config) -> list[Row]:
    """Keys and values of all positions, gathered by every mixer in one microbatch, and their gradients."""
    model, axes = cfg.model, sharding.axes("position")
    whole = _tokens(cfg) * memory.devices(cfg.mesh, axes)
    uses = exchange.forward_passes(cfg, "train") + (model.remat != "none")
    size = whole * _keys(model) / cfg.mesh.tensor * jnp.dtype(model.compute_dtype).itemsize
    return [row("all-gather", axes, cfg, size, uses), row("reduce-scatter", axes, cfg, size, 1)]


def _keys(model: config.Model) -> int:
    """Numbers of keys and values of a position, in all layers."""
    own, layers = model.latent, [kinds.split(kind)[0] for kind in (*config.layers(model), *kinds.further(model))]
    latent = model.heads * (own.nope + own.rope + own.value)
    return sum(latent if name == "latent" else 2 * model.kv_heads * model.head_dim for name in layers)


def _layers(cfg: config.Config) -> int:
    return config.depth(cfg.model) + cfg.model.further


def _tokens(cfg: config.Config) -> float:
    """On one device outside the sparse layer, in one microbatch."""
    parts = memory.devices(cfg.mesh, sharding.axes("shard"))
    return memory.rows(cfg) * cfg.data.context / parts / cfg.train.microbatches


def _vectors(cfg: config.Config) -> float:
    """Bytes of the residual stream on one device in one microbatch."""
    return _tokens(cfg) * cfg.model.width * jnp.dtype(cfg.model.compute_dtype).itemsize


def _losses(cfg: config.Config) -> int:
    """Of the next token and of further ones; each has its own tokens to look up."""
    return 1 + cfg.model.further


def _times(r: Row, number: int) -> Row:
    return r | {name: r[name] * number for name in ("times", "bytes", "wire")}


def moved_bytes(cfg: config.Config, given: int, gradients: int, saved: int) -> float:
    """To and from main memory: arguments read and written, gradients and what is saved for the backward pass written and read, and
    gathered weights written and read in every microbatch as often as they are gathered. Programs move more: activations within layers."""
    micro = cfg.train.microbatches
    weights = sum(
        memory.plain(whole(x).local(cfg.mesh), used(x, cfg)) * uses_of(x, cfg) for x in memory.weights(cfg.model)
    )
    return 2.0 * given + 2 * gradients + micro * (2 * saved + 2 * weights)
