"""One train step and one evaluation step, jitted once each, with explicit shardings in and out and donated state."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from moejax import config, sharding
from moejax.arrays import Batch
from moejax.moe import noise
from moejax.moe.layer import Mode
from moejax.train import losses
from moejax.train.losses import Sums
from moejax.train.state import Built, TrainState


def training_mode(cfg: config.Config) -> Mode:
    return Mode(training=True, capacity_factor=cfg.model.moe.capacity_factor)


def sums_of(built: Built, parameters: Any, batch: Batch, key: jax.Array, mode: Mode, label_kinds: int = 0) -> Sums:
    """The forward pass of one microbatch, as named sums over its valid tokens, reduced over the mesh."""
    model = built.model(parameters)
    hidden, layers = model(batch, key, mode)
    unembedding = sharding.gather(model.unembedding, hidden.dtype)
    nats = losses.vocabulary_nats(hidden, unembedding, batch.targets, built.config.model.loss_chunk)
    sums = losses.token_sums(nats, batch.valid)
    if label_kinds:
        of_label = batch.valid[..., None] & (
            batch.labels[..., None] == jnp.arange(label_kinds, dtype=jnp.int32)[None, None]
        )
        sums["label_nats"] = jnp.sum(jnp.where(of_label, nats[..., None], 0), axis=(0, 1))
        sums["label_targets"] = jnp.sum(of_label, axis=(0, 1), dtype=jnp.int32)
    sums["layers"] = jax.tree.map(lambda s: jnp.sum(s, axis=1), layers)
    return sums


def split_microbatches(batch: Batch, parts: int, group_rows: int) -> Batch:
    """[B, ...] -> [parts, B / parts, ...], whole groups, taken in turn so that every part keeps all batch shards."""

    def cut(x: jax.Array) -> jax.Array:
        rest = x.shape[1:]
        taken = x.reshape(-1, parts, group_rows, *rest).swapaxes(0, 1).reshape(parts, -1, *rest)
        # A reshape forgets mesh axes of one device; nothing moves here.
        return jax.reshard(taken, sharding.spec(None, "batch", *(None for _ in rest)))

    return jax.tree.map(cut, batch)


def gradients(built: Built, parameters: Any, batch: Batch, key: jax.Array) -> tuple[Any, Sums]:
    """The gradient of `losses.objective` of the global batch, and the global sums."""
    moe, mode = built.config.model.moe, training_mode(built.config)

    def loss(parameters: Any) -> tuple[jax.Array, Sums]:
        sums = sums_of(built, parameters, batch, key, mode)
        return losses.objective(sums, moe)[0], sums

    return jax.grad(loss, has_aux=True)(parameters)


def accumulated_gradients(built: Built, parameters: Any, batch: Batch, key: jax.Array) -> tuple[Any, Sums]:
    """The same gradient and sums from one microbatch at a time, exactly.

    The loss is a function L of sums S over the global batch, and S is the sum of the microbatches' S_m. A forward
    pass counts S; then each microbatch differentiates <dL/dS, S_m> with dL/dS held fixed.
    """
    cfg = built.config
    mode = training_mode(cfg)
    parts = split_microbatches(batch, cfg.train.microbatches, cfg.model.moe.group_rows)

    def count(part: Batch) -> Sums:
        return sums_of(built, parameters, part, key, mode)

    first = jax.tree.map(lambda x: x[0], parts)
    zero = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(count, first))
    total, _ = jax.lax.scan(lambda acc, part: (jax.tree.map(jnp.add, acc, count(part)), None), zero, parts)
    real, counts = _split_by_kind(total)
    slope = jax.grad(lambda real: losses.objective(_join(real, counts), cfg.model.moe)[0])(real)

    def part_loss(parameters: Any, part: Batch) -> jax.Array:
        mine, _ = _split_by_kind(sums_of(built, parameters, part, key, mode))
        return sum(jnp.vdot(g, s) for g, s in zip(jax.tree.leaves(slope), jax.tree.leaves(mine), strict=True))

    def add(acc: Any, part: Batch) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, acc, jax.grad(part_loss)(parameters, part)), None

    return jax.lax.scan(add, jax.tree.map(jnp.zeros_like, parameters), parts)[0], total


def _split_by_kind(sums: Sums) -> tuple[Sums, Sums]:
    """The fp32 sums, which have a gradient, and the counts, which have none; each None where the other is."""
    real = jax.tree.map(lambda s: s if jnp.issubdtype(s.dtype, jnp.floating) else None, sums)
    counts = jax.tree.map(lambda s: None if jnp.issubdtype(s.dtype, jnp.floating) else s, sums)
    return real, counts


def _join(real: Sums, counts: Sums) -> Sums:
    return jax.tree.map(lambda r, c: c if r is None else r, real, counts, is_leaf=lambda x: x is None)


def make_train_step(built: Built, state: TrainState) -> Callable[[TrainState, Batch], tuple[TrainState, Sums]]:
    """(state, batch) -> (state, sums), the state donated. The sums carry `gradient_norm` of before clipping."""
    differentiate = gradients if built.config.train.microbatches == 1 else accumulated_gradients

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Sums]:
        key = noise.step_key(built.config.train.seed, state.step)
        slope, sums = differentiate(built, state.parameters, batch, key)
        updates, moments = built.transform.update(slope, state.optimizer, state.parameters)
        parameters = optax.apply_updates(state.parameters, updates)
        sums["gradient_norm"] = optax.tree.norm(slope)
        return TrainState(state.step + 1, parameters, moments), sums

    where = jax.tree.map(lambda x: x.sharding, state)
    rows, whole = sharding.batch_sharding(built.mesh), sharding.replicated(built.mesh)
    return jax.jit(step, in_shardings=(where, rows), out_shardings=(where, whole), donate_argnums=0)


def make_eval_step(
    built: Built, state: TrainState, capacity_factor: float | None, label_kinds: int
) -> Callable[[Any, Batch], Sums]:
    """(parameters, batch) -> sums, without noise, dropless unless a capacity factor is given, with tables by label."""
    mode = Mode(training=False, capacity_factor=capacity_factor, label_kinds=label_kinds)

    def step(parameters: Any, batch: Batch) -> Sums:
        return sums_of(built, parameters, batch, jax.random.key(0), mode, label_kinds)

    where = jax.tree.map(lambda x: x.sharding, state.parameters)
    rows, whole = sharding.batch_sharding(built.mesh), sharding.replicated(built.mesh)
    return jax.jit(step, in_shardings=(where, rows), out_shardings=whole)
