"""One train step and one evaluation step, jitted once each, with explicit shardings in and out and donated state."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from moejax import compat, config, sharding
from moejax.arrays import Batch
from moejax.data import batches, tokenizer
from moejax.data.pipeline import DAMAGED
from moejax.layers.feed_forward import Outcome
from moejax.models.decoder import Recordings, Routing
from moejax.moe import balancers, noise
from moejax.moe.inputs import Mode
from moejax.train import faults, guard, losses, routing
from moejax.train.losses import Sums
from moejax.train.state import Built, TrainState


class Setting(NamedTuple):
    """What a forward pass reads beside parameters and tokens; nothing of it is differentiated."""

    key: jax.Array
    """The step's noise key."""
    routing: Routing
    step: jax.Array


def batch_shardings(built: Built) -> Batch:
    """Where a run's batches lie."""
    return batches.shardings(built.mesh, counted=built.config.data.tokenizer != tokenizer.NAME)


def training_mode(cfg: config.Config) -> Mode:
    return Mode(training=True, capacity_factor=cfg.model.moe.capacity_factor, record=cfg.train.record_every > 0)


def setting(built: Built, state: TrainState) -> Setting:
    """Of a training step."""
    return Setting(noise.step_key(built.config.train.seed, state.step), state.routing, state.step)


def still(state: TrainState) -> Setting:
    """Of an evaluation: the noise of no step."""
    return Setting(jax.random.key(0), state.routing, state.step)


class Nats(NamedTuple):
    """What a forward pass says of every target."""

    nats: Float[Array, "B T"]
    """-log p."""
    outcomes: dict[str, Outcome]
    """What the layers report."""
    further: list[tuple[Float[Array, "B T"], Batch]]
    """The same of every module that predicts a further token, and what it predicts where."""


def nats_of(
    built: Built, parameters: Any, batch: Batch, at: Setting, mode: Mode, recorded: Recordings | None = None
) -> Nats:
    """The forward pass."""
    model, chunk = built.model(parameters), built.config.model.loss_chunk
    hidden, outcomes, further = model(batch, at.key, mode, at.routing, at.step, recorded)

    def nats(hidden: Array, targets: Array) -> Float[Array, "B T"]:
        return losses.vocabulary_nats(hidden, model.unembedding[...], targets, chunk)

    return Nats(nats(hidden, batch.targets), outcomes, [(nats(h, own.targets), own) for h, own in further])


def sums_of(
    built: Built, parameters: Any, batch: Batch, at: Setting, mode: Mode, recorded: Recordings | None = None
) -> tuple[Sums, Recordings]:
    """The forward pass of one microbatch, as named sums over its valid tokens, reduced over the mesh; and its routing where
    the mode records."""
    moe = built.config.model.moe
    layout = sharding.LAYOUTS[moe.tensor]
    nats, outcomes, further = nats_of(built, parameters, batch, at, mode, recorded)
    sums = losses.token_sums(nats, batch, layout)
    if further:
        each = [losses.token_sums(of_module, own, layout) for of_module, own in further]
        sums["further"] = jax.tree.map(lambda *sums: jnp.stack(sums, axis=1), *each)
    if mode.label_kinds:
        of_label = batch.valid[..., None] & (
            batch.labels[..., None] == jnp.arange(mode.label_kinds, dtype=jnp.int32)[None, None]
        )
        sums["label_nats"] = losses.by_shard(jnp.where(of_label, nats[..., None], 0), layout)
        sums["label_targets"] = losses.by_shard(of_label.astype(jnp.int32), layout)
        if batch.bytes is not None:
            sums["label_bytes"] = losses.by_shard(jnp.where(of_label, batch.bytes[..., None], 0), layout)
    if built.config.data.allow_damaged:
        sums["damaged_targets"] = losses.by_shard((batch.labels == DAMAGED).astype(jnp.int32), layout)
    sums["layers"] = {kind: jax.tree.map(lambda s: s.swapaxes(0, 1), o["sums"]) for kind, o in outcomes.items()}
    sums = losses.reduced(sums, layout)
    sums["layers"] = {kind: balancers.over_microbatch(stats, moe) for kind, stats in sums["layers"].items()}
    return sums, {kind: o["recorded"] for kind, o in outcomes.items() if "recorded" in o}


def split_microbatches(batch: Batch, parts: int, group_rows: int) -> Batch:
    """[B, ...] -> [parts, B / parts, ...], whole groups, taken in turn so that every part keeps all batch shards."""

    def cut(x: jax.Array) -> jax.Array:
        rest = x.shape[1:]
        taken = x.reshape(-1, parts, group_rows, *rest).swapaxes(0, 1).reshape(parts, -1, *rest)
        # A reshape forgets mesh axes of one device; nothing moves here.
        return jax.reshard(taken, sharding.spec(None, "batch", *("position" for _ in rest)))

    return jax.tree.map(cut, batch)


def gradients(
    built: Built, parameters: Any, batch: Batch, at: Setting, recorded: Recordings | None = None
) -> tuple[Any, Sums, Recordings]:
    """The gradient of `losses.objective` of the global batch, the global sums, and the routing where the config records."""
    mode = training_mode(built.config)

    def loss(parameters: Any) -> tuple[jax.Array, tuple[Sums, Recordings]]:
        sums, routed = sums_of(built, parameters, batch, at, mode, recorded)
        return losses.objective(sums, at.routing, built.config.model)[0], (sums, routed)

    slope, (sums, routed) = jax.grad(loss, has_aux=True)(parameters)
    return slope, sums, routed


def accumulated_gradients(
    built: Built, parameters: Any, batch: Batch, at: Setting, recorded: Recordings | None = None
) -> tuple[Any, Sums, Recordings]:
    """The same from one microbatch at a time, exactly.

    The loss is a function L of sums S over the global batch, and S is the sum of the microbatches' S_m. A forward
    pass counts S; then each microbatch differentiates <dL/dS, S_m> with dL/dS held fixed.
    """
    cfg, mode = built.config, training_mode(built.config)
    number = cfg.train.microbatches
    parts = split_microbatches(batch, number, cfg.model.moe.group_rows), split_recordings(recorded, cfg)

    def count(part: tuple[Batch, Recordings | None]) -> tuple[Sums, Recordings]:
        return sums_of(built, parameters, part[0], at, mode, part[1])

    first = jax.tree.map(lambda x: x[0], parts)
    zero = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(count, first)[0])

    def counted(total: Sums, part: tuple[Batch, Recordings | None]) -> tuple[Sums, Recordings]:
        sums, routed = count(part)
        return jax.tree.map(jnp.add, total, sums), routed

    total, routed = jax.lax.scan(counted, zero, parts)
    real, counts = _split_by_kind(total)
    slope = jax.grad(lambda real: losses.objective(_join(real, counts), at.routing, cfg.model)[0])(real)

    def part_loss(parameters: Any, part: tuple[Batch, Recordings | None]) -> jax.Array:
        mine, _ = _split_by_kind(sums_of(built, parameters, part[0], at, mode, part[1])[0])
        return sum(jnp.vdot(g, s) for g, s in zip(jax.tree.leaves(slope), jax.tree.leaves(mine), strict=True))

    def add(acc: Any, part: tuple[Batch, Recordings | None]) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, acc, jax.grad(part_loss)(parameters, part)), None

    gradient = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, parameters), parts)[0]
    return gradient, total, join_recordings(routed, cfg)


def split_recordings(recorded: Recordings | None, cfg: config.Config) -> Recordings | None:
    """[layers, groups, n] -> [microbatches, layers, groups, n], as `split_microbatches` takes the rows."""
    unit = groups_of_unit(cfg)

    def cut(x: jax.Array) -> jax.Array:
        layers, _, width = x.shape
        taken = jnp.moveaxis(x.reshape(layers, -1, cfg.train.microbatches, unit, width), 2, 0)
        taken = taken.reshape(cfg.train.microbatches, layers, -1, width)
        return jax.reshard(taken, sharding.spec(None, None, "batch", None))

    return jax.tree.map(cut, recorded)


def join_recordings(recorded: Recordings, cfg: config.Config) -> Recordings:
    """The inverse of `split_recordings`."""
    unit = groups_of_unit(cfg)

    def join(x: jax.Array) -> jax.Array:
        parts, layers, _, width = x.shape
        together = jnp.moveaxis(x.reshape(parts, layers, -1, unit, width), 0, 2)
        return jax.reshard(together.reshape(layers, -1, width), sharding.spec(None, "batch", None))

    return jax.tree.map(join, recorded)


def groups_of_unit(cfg: config.Config) -> int:
    """Groups in the rows that a microbatch takes at a time: one, or the windows of a row."""
    window = cfg.model.moe.group_window
    return 1 if window is None else cfg.data.context // window


def _split_by_kind(sums: Sums) -> tuple[Sums, Sums]:
    """The fp32 sums, which have a gradient, and the counts, which have none; each None where the other is."""
    real = jax.tree.map(lambda s: s if jnp.issubdtype(s.dtype, jnp.floating) else None, sums)
    counts = jax.tree.map(lambda s: None if jnp.issubdtype(s.dtype, jnp.floating) else s, sums)
    return real, counts


def _join(real: Sums, counts: Sums) -> Sums:
    return jax.tree.map(lambda r, c: c if r is None else r, real, counts, is_leaf=lambda x: x is None)


def make_train_step(
    built: Built, state: TrainState, *, replay: bool = False
) -> Callable[..., tuple[TrainState, Sums, Recordings]]:
    """(state, batch) -> (state, sums, routing), the state donated; with `replay` (state, batch, recorded routing).

    The sums carry `parts`, the loss that was differentiated and what it is made of, `gradient_norm` of before
    clipping, and `guard`: a step whose numbers are not finite changes nothing but that and the step. The routing is empty
    unless the config records.
    """
    cfg = built.config
    differentiate = gradients if cfg.train.microbatches == 1 else accumulated_gradients

    def step(
        state: TrainState, batch: Batch, recorded: Recordings | None = None
    ) -> tuple[TrainState, Sums, Recordings]:
        slope, sums, routed = differentiate(built, state.parameters, batch, setting(built, state), recorded)
        if cfg.faults.nan_at:
            bad = faults.bad_numbers(cfg.faults, state.step)
            slope = jax.tree.map(lambda g: jnp.where(bad, jnp.nan, g), slope)
        updates, moments = built.transform.update(slope, state.optimizer, state.parameters)
        number = state.step + 1
        sums["parts"] = losses.objective(sums, state.routing, cfg.model)[1]
        sums["gradient_norm"] = optax.tree.norm(slope)
        new = (
            optax.apply_updates(state.parameters, updates),
            moments,
            routing.update(state.routing, sums["layers"], cfg.model.moe, number),
        )
        loss = sums["parts"]["loss"]
        good = guard.good_step(loss, slope, updates)
        parameters, moments, kept = guard.chosen(good, new, (state.parameters, state.optimizer, state.routing))
        sums["guard"] = guard.after(state.guard, good, loss, number, cfg.train.spike)
        return TrainState(number, parameters, moments, kept, sums["guard"]), sums, routed

    where = jax.tree.map(lambda x: x.sharding, state)
    rows, whole = batch_shardings(built), sharding.replicated(built.mesh)
    inputs = (where, rows, sharding.groups_sharding(built.mesh)) if replay else (where, rows)
    options = compat.overlapping(built.mesh.devices.flat[0].platform) if built.config.train.overlap else {}
    return jax.jit(step, in_shardings=inputs, out_shardings=(where, whole, whole), donate_argnums=0, **options)


def make_score_step(built: Built, state: TrainState, mode: Mode) -> Callable[[TrainState, Batch], Float[Array, "B T"]]:
    """(state, batch) -> -log p of every target in nats, whole on every device. Nothing of the state moves."""

    def step(state: TrainState, batch: Batch) -> Array:
        return nats_of(built, state.parameters, batch, still(state), mode).nats

    where = jax.tree.map(lambda x: x.sharding, state)
    rows, whole = batches.shardings(built.mesh), sharding.replicated(built.mesh)
    return jax.jit(step, in_shardings=(where, rows), out_shardings=whole)


def make_eval_step(
    built: Built, state: TrainState, mode: Mode
) -> Callable[[TrainState, Batch], tuple[Sums, Recordings]]:
    """(state, batch) -> (sums, routing), with the noise of no step. Nothing of the state moves."""

    def step(state: TrainState, batch: Batch) -> tuple[Sums, Recordings]:
        return sums_of(built, state.parameters, batch, still(state), mode)

    where = jax.tree.map(lambda x: x.sharding, state)
    rows, whole = batch_shardings(built), sharding.replicated(built.mesh)
    return jax.jit(step, in_shardings=(where, rows), out_shardings=whole)
