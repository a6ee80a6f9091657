"""Bad steps: what counts as one, what is remembered of them, and when a run goes back. Pure functions of arrays; the state is returned."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float

from moejax import config
from moejax.errors import ConfigError, DivergedError

Guard = dict[str, Array]
"""Of the train state, all scalars: skipped (bad steps so far), row (of them, the last in a row), worst (most in a row), mean (running mean
of the loss), seen (good steps), spike (the first step whose loss spiked, 0 for none)."""
WARMUP, WINDOW = 20, 50
"""Good steps before a loss can spike, and good steps that the mean remembers."""


def init() -> Guard:
    """Of a run that has made no step."""
    zeros = {name: jnp.zeros((), jnp.int32) for name in ("skipped", "row", "worst", "seen", "spike")}
    return zeros | {"mean": jnp.zeros((), jnp.float32)}


def good_step(loss: Float[Array, ""], *trees: Any) -> Bool[Array, ""]:
    """Whether the loss and every number of the trees are finite. A sum of squares that overflows counts as not."""
    return jnp.stack([jnp.isfinite(loss), *(jnp.isfinite(optax.tree.norm(tree)) for tree in trees)]).all()


def chosen(good: Bool[Array, ""], new: Any, old: Any) -> Any:
    """The new tree after a good step, the old one after a bad one: nothing of a bad step is kept, moments and counters neither."""
    return jax.tree.map(lambda a, b: jnp.where(good, a, b), new, old)


def after(guard: Guard, good: Bool[Array, ""], loss: Float[Array, ""], step: Array, spike: float) -> Guard:
    """The guard after step number `step`, counted from 1. With `spike` a loss above that multiple of the mean is noted, once."""
    row = jnp.where(good, 0, guard["row"] + 1)
    high = good & (guard["seen"] >= WARMUP) & (loss > spike * guard["mean"]) if spike else jnp.zeros((), bool)
    seen = guard["seen"] + good.astype(jnp.int32)
    rate = 1 / jnp.clip(seen, 1, WINDOW).astype(jnp.float32)
    usual = jnp.where(good, guard["mean"] + rate * (loss - guard["mean"]), guard["mean"])
    return {
        "skipped": guard["skipped"] + 1 - good.astype(jnp.int32),
        "row": row,
        "worst": jnp.maximum(guard["worst"], row),
        "seen": seen,
        "mean": usual,
        "spike": jnp.where((guard["spike"] == 0) & high, step, guard["spike"]),
    }


def require_few(guard: dict[str, Any], train: config.Train, step: int) -> None:
    """Raises DivergedError after `train.max_bad_steps` bad steps in a row."""
    if guard["worst"] >= train.max_bad_steps:
        raise DivergedError(
            f"{int(guard['worst'])} steps in a row up to step {step} had a loss, gradient or update that is not finite; none of them "
            "changed the weights. Lower train.learning_rate or train.clip_norm"
        )


def check(train: config.Train) -> None:
    """The rules of the guard's options."""
    if train.max_bad_steps < 1:
        raise ConfigError(f"train.max_bad_steps={train.max_bad_steps}: at least 1")
    if train.spike and not train.spike > 1:
        raise ConfigError(f"train.spike={train.spike}: a multiple above 1 of the usual loss, or 0 for none")
    if train.max_rollbacks < 0 or train.replicas_every < 0:
        raise ConfigError(
            f"train.max_rollbacks={train.max_rollbacks}, replicas_every={train.replicas_every}: numbers of times and of steps, not below 0"
        )
