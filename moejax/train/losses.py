"""The loss as a pure function of sums over the global batch: what is differentiated is what is logged.

sums = {"nats", "targets", "bytes" where tokens are not bytes, "layers": {kind: {name: [layers, ...]}},
        "further": {"nats", "targets"} [modules] where further tokens are predicted}
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moejax import config, sharding
from moejax.arrays import Batch
from moejax.models.decoder import Routing
from moejax.moe import balancers
from moejax.moe.balancers import share
from moejax.sharding import Layout

Sums = dict[str, Any]


def vocabulary_nats(
    hidden: Float[Array, "B T D"], unembedding: Float[Array, "D V"], targets: Int[Array, "B T"], chunk: int
) -> Float[Array, "B T"]:
    """-log p(target) in nats, fp32, with `chunk` columns of the stored unembedding gathered at a time, and their logits; backward too."""
    hidden = jax.reshard(hidden, sharding.spec("batch", "position", None))
    targets = jax.reshard(targets, sharding.spec("batch", "position"))
    width, vocabulary = unembedding.shape
    columns = unembedding.reshape(width, vocabulary // chunk, chunk).swapaxes(0, 1)
    dims = ("storage", "vocabulary")
    columns = jax.reshard(columns, sharding.spec(None, *dims))
    place = jax.reshard(jnp.arange(chunk, dtype=jnp.int32), sharding.spec("vocabulary"))
    first = chunk * jnp.arange(vocabulary // chunk, dtype=jnp.int32)

    def turn(carry: tuple[Array, Array], scanned: tuple[Array, Array]) -> tuple[tuple[Array, Array], None]:
        log_z, picked = carry
        stored, start = scanned
        weight = sharding.joined(stored, dims, hidden.dtype)
        logits = jnp.einsum("btd,dv->btv", hidden, weight, preferred_element_type=jnp.float32)
        hit = (targets - start)[..., None] == place[None, None]
        picked = picked + jnp.sum(jnp.where(hit, logits, 0), axis=-1)
        return (jnp.logaddexp(log_z, jax.nn.logsumexp(logits, axis=-1)), picked), None

    start = jnp.full_like(targets, -jnp.inf, dtype=jnp.float32), jnp.zeros_like(targets, dtype=jnp.float32)
    (log_z, picked), _ = jax.lax.scan(jax.checkpoint(turn, prevent_cse=False), start, (columns, first))
    return log_z - picked


def token_sums(nats: Float[Array, "B T"], batch: Batch, layout: Layout) -> Sums:
    """Nats, number and (where they are not one each) bytes of the valid targets, by shard."""
    counts = {"targets": batch.valid.astype(jnp.int32)}
    if batch.bytes is not None:
        counts["bytes"] = jnp.where(batch.valid, batch.bytes, 0)
    sums = {"nats": jnp.where(batch.valid, nats, 0)} | counts
    return {name: by_shard(x, layout) for name, x in sums.items()}


def by_shard(x: Array, layout: Layout) -> Array:
    """[B, T, ...] -> [shards, ...], rows and positions of each shard summed. Nothing moves."""
    rest = (None for _ in x.shape[2:])
    where = sharding.spec("batch", layout.position, *rest)
    body = jax.shard_map(
        lambda x: jnp.sum(x, axis=(0, 1), dtype=x.dtype)[None], in_specs=where, out_specs=sharding.spec(layout.shard)
    )
    return body(jax.reshard(x, where))


def reduced(tree: Any, layout: Layout) -> Any:
    """Every array [shards, ...] summed over the shards, with one reduction over the mesh for each type of number."""
    if jax.tree.leaves(tree)[0].shape[0] == 1:  # jax 0.12 cannot differentiate the concatenation of arrays of one shard
        return jax.tree.map(lambda x: jnp.sum(x, axis=0, dtype=x.dtype), tree)
    leaves, structure = jax.tree.flatten(tree)
    totals: list[Array] = list(leaves)
    for dtype in sorted({x.dtype for x in leaves}, key=str):
        mine = [i for i, x in enumerate(leaves) if x.dtype == dtype]
        # A reshape alone may forget the shard axis.
        rows = sharding.spec(layout.shard, None)
        flat = [leaves[i].reshape(leaves[i].shape[0], -1, out_sharding=rows) for i in mine]
        packed = jnp.concatenate(flat, axis=1)
        total, start = jnp.sum(packed, axis=0, dtype=dtype), 0
        for i in mine:
            shape = leaves[i].shape[1:]
            totals[i] = total[start : start + math.prod(shape)].reshape(shape)
            start += math.prod(shape)
    return jax.tree.unflatten(structure, totals)


def objective(sums: Sums, routing: Routing, model: config.Model) -> tuple[Float[Array, ""], dict[str, Array]]:
    """Mean nats per target, those of further targets averaged over modules, the balancers' losses averaged over layers, and these parts
    by name.

    `routing` is the state that the step began with; adaptive weights are in it. A balancer with coefficient 0 is reported
    and not added; the parts are without coefficients and weights.
    """
    parts = {"cross_entropy": share(sums["nats"], sums["targets"])}
    loss, moe = parts["cross_entropy"], model.moe
    if "further" in sums:
        parts["further"] = jnp.mean(share(sums["further"]["nats"], sums["further"]["targets"]))
        loss = loss + model.further_weight * parts["further"]
    kinds = [balancers.losses(stats, routing.get(kind, {}), moe) for kind, stats in sums["layers"].items()]
    for name in kinds[0] if kinds else ():
        values, weights = (jnp.concatenate(parts) for parts in zip(*(kind[name] for kind in kinds), strict=True))
        parts[name] = jnp.mean(values)
        if getattr(moe, name):
            loss = loss + jnp.mean(weights * values)
    return loss, {"loss": loss, **parts}
