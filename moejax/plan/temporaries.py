"""An estimate of what a step makes on the way, in bytes of one device. It prunes meshes that cannot fit; the compiler decides.

What lives at once: gradients, what the forward pass saves for the backward pass, and the largest working set of one layer or of the loss.
How far it is from the compiler is MARGIN.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax.numpy as jnp

from moejax import config, sharding
from moejax.layers import kinds
from moejax.moe import widths
from moejax.moe.transport import ragged
from moejax.plan import exchange, memory, skew, traffic

MARGIN = 0.3
"""Share of the estimate by which the compiler's temporaries may differ. Of seven steps of small models that jax 0.10.2 compiled for 4
and 8 chips (tests/aot/test_plan.py has them) they were 0.96 to 1.23 times the estimate."""
SCORES = 3
"""Arrays of all scores of a layer in fp32 that a training step has at once."""
BACKWARD = 2.8
"""What the compiler has reserved with a backward pass, as a multiple of the rows of a round forward (moe/transport/ragged.py)."""
BUFFERED = 2.2
"""The same of rows that are gathered, or lie in buffers of a capacity, as compiled."""
SUMMED = 3
"""Copies of the gradients where microbatches add to a sum: it, what is added, and what it becomes. With three, a step of 32 experts, width
1024 and four microbatches had 0.98 of the estimate as compiled (jax 0.10.2, v5p:2x2x2), and a small one 1.14."""
INTEGERS = 16
"""Bytes of routing that every policy saves of an assignment."""


class Estimate(NamedTuple):
    """Of one step on one device, in bytes."""

    gradients: int
    saved: int
    """From the forward pass for the backward pass: the residual stream before every layer, and what the policy adds."""
    working: int
    """Stored weights cast, those of one layer gathered, scores, rows of experts; or a chunk of the loss, if that is more."""

    @property
    def total(self) -> int:
        return sum(self)


def estimate(cfg: config.Config, step: str = "train") -> Estimate:
    """Of a step of `plan.programs`. Raises ValueError for an unknown one."""
    if step != "train":
        loss = _tables(cfg, step) / 2 if step == "eval" else 0.0
        return Estimate(0, 0, int(max(_layer(cfg, step, training=False), loss)))
    own = [memory.padded_bytes(x.local(cfg.mesh), x.dtype) for x in memory.weights(cfg.model)]
    gradients = sum(own) * (SUMMED if cfg.train.microbatches > 1 else 1)
    working = max(_layer(cfg, step, training=True), _tables(cfg, step)) + _cast(cfg)
    return Estimate(gradients, int(_saved(cfg)), int(working))


def _saved(cfg: config.Config) -> float:
    """By policy: inputs of every layer and routing; rows as they arrive and come home; results of products; everything."""
    model, policy = cfg.model, cfg.model.remat
    vectors, wide = _vectors(cfg, "train"), jnp.dtype(model.compute_dtype).itemsize
    layers = config.depth(model) + model.further
    sparse, here = kinds.number(model, "sparse"), exchange.local_tokens(cfg, "train")
    kept = layers * vectors + sparse * here * model.moe.top_k * INTEGERS
    if policy == "full":
        return kept
    kept += sparse * 2 * exchange.buffer_bytes(cfg, "train")
    if policy == "exchanged":
        return kept
    tensor, tokens = cfg.mesh.tensor, vectors / (model.width * wide)
    products = model.heads * model.head_dim * 2 + model.kv_heads * model.head_dim * 2
    scores = 0.0 if traffic.chunked(cfg) else layers * _scores(cfg, "train")
    kept += layers * tokens * (products / tensor + model.width) * wide + scores
    kept += (
        (kinds.number(model, "dense") * model.hidden + sparse * model.moe.shared_hidden) * 2 / tensor * tokens * wide
    )
    if policy == "selective":
        return kept
    gathered = sum(memory.padded_bytes(traffic.whole(x).local(cfg.mesh), model.compute_dtype) for x in _in_layers(cfg))
    rows = exchange.buffer_bytes(cfg, "train") / exchange.row_bytes(cfg)
    inner = sparse * rows * sum(widths.of_classes(model.moe)) / len(widths.of_classes(model.moe)) * 2 * wide
    return kept + gathered + inner + 4 * layers * vectors + scores


def _layer(cfg: config.Config, step: str, training: bool) -> float:
    """Of the largest layer: its weights gathered in fp32, cast, and with a gradient; scores; rows of its experts."""
    parts: dict[str, float] = {}
    for x in _in_layers(cfg):
        shape = traffic.whole(x).local(cfg.mesh)[x.stacked :]
        name = "/".join(x.path[: 3 if x.path[0] == "blocks" else 2])
        size = memory.padded_bytes(shape, x.dtype) + memory.padded_bytes(shape, cfg.model.compute_dtype)
        parts[name] = parts.get(name, 0) + size * (1.7 if training else 1)
    scores = _scores(cfg, step) * (SCORES if training else 2)
    return max(parts.values()) + max(scores, _experts(cfg, step, training)) + 6 * _vectors(cfg, step)


def _experts(cfg: config.Config, step: str, training: bool) -> float:
    """Rows of one sparse layer: sent, received, in and out of experts, whose hidden numbers are in fp32."""
    moe = cfg.model.moe
    if not kinds.number(cfg.model, "sparse"):
        return 0.0
    here, hidden = exchange.local_tokens(cfg, step), max(widths.of_classes(moe))
    wide = jnp.dtype(cfg.model.compute_dtype).itemsize
    width, shards = exchange.row_bytes(cfg) // wide, skew.shards(cfg)
    hidden = hidden // memory.devices(cfg.mesh, sharding.axes(sharding.LAYOUTS[moe.tensor].hidden))
    transport = exchange.of_step(cfg, step).model.moe.transport
    if transport == "ragged":
        rows = int(here * moe.top_k / moe.chunks)
        return ragged.round_bytes(moe.receive_buffer, shards, rows, width, hidden, wide) * (BACKWARD if training else 1)
    # Gathered rows are as many as the tokens of all devices could send here.
    gathered = here * moe.top_k * shards
    rows = gathered if transport == "gather" else exchange.buffer_bytes(cfg, step) / exchange.row_bytes(cfg)
    masks = 0.0
    if transport == "einsum":
        group = moe.group_window or moe.group_rows * cfg.data.context
        masks = rows * group * (4 + wide)
    return (rows * (4 * width * wide + 3 * hidden * 4) + masks) * (BUFFERED if training else 1)


def _cast(cfg: config.Config) -> int:
    """What a device stores of all layers in the compute type: the compiler casts before the loop over layers that gathers them."""
    used = cfg.model.compute_dtype
    return sum(memory.padded_bytes(x.local(cfg.mesh), used) for x in _in_layers(cfg) if x.dtype != used)


def _tables(cfg: config.Config, step: str) -> float:
    """The columns of a chunk gathered and cast, with a gradient in fp32, its logits with theirs, and what is stored of the unembedding
    in the order of chunks."""
    model, wide = cfg.model, jnp.dtype(cfg.model.compute_dtype).itemsize
    columns = model.loss_chunk / cfg.mesh.tensor
    tokens = _vectors(cfg, step) / (model.width * wide)
    stored = sum(math.prod(x.local(cfg.mesh)) for x in memory.weights(model) if x.path[0] == "unembedding")
    return columns * (model.width * (4 + wide) + 2 * 4 * tokens) + 2 * 4 * stored


def _in_layers(cfg: config.Config) -> list[memory.Lying]:
    return [x for x in memory.weights(cfg.model) if x.path[0] not in traffic.TABLES]


def _scores(cfg: config.Config, step: str) -> float:
    """Of one layer in fp32, all pairs of a key and a query here, or a query of those that are taken at a time."""
    queries = _vectors(cfg, step) / (cfg.model.width * jnp.dtype(cfg.model.compute_dtype).itemsize)
    if step != "decode" and traffic.chunked(cfg):
        queries *= cfg.model.query_chunk / traffic.positions(cfg)
    return 4 * queries * cfg.data.context * cfg.model.heads / cfg.mesh.tensor


def _vectors(cfg: config.Config, step: str) -> float:
    """The residual stream on one device, in one microbatch."""
    parts = memory.devices(cfg.mesh, sharding.axes("shard"))
    read = cfg.data.batch if step == "decode" else memory.rows(cfg) * cfg.data.context
    tokens = read / parts / (cfg.train.microbatches if step == "train" else 1)
    return tokens * cfg.model.width * jnp.dtype(cfg.model.compute_dtype).itemsize
