"""AdamW with linear warm-up, cosine decay and global-norm clipping, all from optax."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from moejax import config
from moejax.errors import ConfigError


def schedule(train: config.Train) -> optax.Schedule:
    """Learning rate by step: 0 to the peak over `warmup`, then a cosine to the final rate at `steps`."""
    return optax.warmup_cosine_decay_schedule(
        0.0, train.learning_rate, train.warmup, max(train.steps, train.warmup + 1), train.final_learning_rate
    )


def make(train: config.Train, decay: Any, rates: Any = None) -> optax.GradientTransformation:
    """The optimiser; `decay` is a tree of booleans like the parameters: which have weight decay. `rates` are factors of their learning
    rates, None for none: its state is the same with and without."""
    adam = optax.scale_by_adam(b1=train.b1, b2=train.b2, eps=train.epsilon)
    return optax.chain(
        clipping(train),
        optax.chain(
            adam if rates is None else times(adam, rates),
            # After the factors: a weight forgets by the schedule alone, as in the tuned model (Kosson et al. 2025).
            optax.add_decayed_weights(train.weight_decay, decay),
            optax.scale_by_learning_rate(schedule(train)),
        ),
    )


def times(transform: optax.GradientTransformation, factors: Any) -> optax.GradientTransformation:
    """The transformation with its updates multiplied by a tree of numbers."""

    def update(updates: Any, state: Any, parameters: Any = None) -> tuple[Any, Any]:
        updates, state = transform.update(updates, state, parameters)
        return jax.tree.map(lambda u, factor: u * factor, updates, factors), state

    return optax.GradientTransformation(transform.init, update)


def clipping(train: config.Train) -> optax.GradientTransformation:
    """By the global norm, and by its running mean where the spike guard is on."""
    whole = optax.clip_by_global_norm(train.clip_norm)
    return optax.chain(clip_spikes(train.clip_spike), whole) if train.clip_spike else whole


class SpikeState(NamedTuple):
    mean: jax.Array
    """Running mean of the norms, as limited."""
    steps: jax.Array
    """Steps seen."""


SPIKE_WARMUP, SPIKE_WINDOW = 20, 100
"""Steps before the guard acts, and steps that its mean remembers."""


def clip_spikes(multiple: float) -> optax.GradientTransformation:
    """Limits the global norm to `multiple` of its running mean, so that one bad batch moves no further than a usual one."""

    def init(parameters: Any) -> SpikeState:
        return SpikeState(jnp.zeros((), jnp.float32), jnp.zeros((), jnp.int32))

    def update(updates: Any, state: SpikeState, parameters: Any = None) -> tuple[Any, SpikeState]:
        norm = optax.tree.norm(updates)
        limit = jnp.where(state.steps >= SPIKE_WARMUP, multiple * state.mean, jnp.inf)
        kept = jnp.minimum(norm, limit)
        scale = jnp.where(norm > limit, limit / norm, 1.0)
        count = state.steps + 1
        mean = state.mean + (kept - state.mean) / jnp.minimum(count, SPIKE_WINDOW)
        return jax.tree.map(lambda u: u * scale, updates), SpikeState(mean, count)

    return optax.GradientTransformation(init, update)


def check(train: config.Train) -> None:
    """The rules of optimisation."""
    if train.steps < 1:
        raise ConfigError(f"train.steps={train.steps}: at least 1")
    if not 0 <= train.warmup < train.steps:
        raise ConfigError(
            f"train.warmup={train.warmup} of train.steps={train.steps}: warm-up ends before the last step; lower it"
        )
    for name in ("learning_rate", "clip_norm", "epsilon"):
        if not getattr(train, name) > 0:
            raise ConfigError(f"train.{name}={getattr(train, name)}: above 0")
    if min(train.final_learning_rate, train.weight_decay) < 0:
        raise ConfigError(
            f"train.final_learning_rate={train.final_learning_rate}, train.weight_decay={train.weight_decay}: not below 0"
        )
    if train.clip_spike and not train.clip_spike > 1:
        raise ConfigError(
            f"train.clip_spike={train.clip_spike}: a multiple above 1 of the usual norm, or 0 for no guard"
        )
    for name in ("b1", "b2"):
        if not 0 <= getattr(train, name) < 1:
            raise ConfigError(f"train.{name}={getattr(train, name)}: a decay in [0, 1)")
