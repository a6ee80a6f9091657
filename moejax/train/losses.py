"""The loss as a pure function of sums over the global batch: what is differentiated is what is logged.

sums = {"nats", "targets", "layers": {kind: {name: [layers, ...]}}}
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moejax import config
from moejax.moe.balance import BALANCERS, share

Sums = dict[str, Any]


def vocabulary_nats(
    hidden: Float[Array, "B T D"], unembedding: Float[Array, "D V"], targets: Int[Array, "B T"], chunk: int
) -> Float[Array, "B T"]:
    """-log p(target) in nats, fp32, with the logits of `chunk` vocabulary columns in memory at a time, backward too."""
    width, vocabulary = unembedding.shape
    columns = unembedding.reshape(width, vocabulary // chunk, chunk).swapaxes(0, 1)
    first = chunk * jnp.arange(vocabulary // chunk, dtype=jnp.int32)

    def turn(carry: tuple[Array, Array], scanned: tuple[Array, Array]) -> tuple[tuple[Array, Array], None]:
        log_z, picked = carry
        weight, start = scanned
        logits = jnp.einsum("btd,dv->btv", hidden, weight, preferred_element_type=jnp.float32)
        hit = (targets - start)[..., None] == jnp.arange(chunk, dtype=jnp.int32)[None, None]
        picked = picked + jnp.sum(jnp.where(hit, logits, 0), axis=-1)
        return (jnp.logaddexp(log_z, jax.nn.logsumexp(logits, axis=-1)), picked), None

    start = jnp.full_like(targets, -jnp.inf, dtype=jnp.float32), jnp.zeros_like(targets, dtype=jnp.float32)
    (log_z, picked), _ = jax.lax.scan(jax.checkpoint(turn, prevent_cse=False), start, (columns, first))
    return log_z - picked


def token_sums(nats: Float[Array, "B T"], valid: Bool[Array, "B T"]) -> Sums:
    """Nats and number of the valid targets."""
    return {"nats": jnp.sum(jnp.where(valid, nats, 0)), "targets": jnp.sum(valid, dtype=jnp.int32)}


def objective(sums: Sums, moe: config.MoE) -> tuple[Float[Array, ""], dict[str, Array]]:
    """Mean nats per target plus the balancers' losses averaged over layers, and these parts by name.

    A balancer with coefficient 0 is reported and not added.
    """
    parts = {"cross_entropy": share(sums["nats"], sums["targets"])}
    loss = parts["cross_entropy"]
    for name, balancer in BALANCERS.items() if sums["layers"] else ():
        parts[name] = jnp.mean(jnp.concatenate([jax.vmap(balancer.loss)(stats) for stats in sums["layers"].values()]))
        if balancer.coefficient(moe):
            loss = loss + balancer.coefficient(moe) * parts[name]
    return loss, {"loss": loss, **parts}
