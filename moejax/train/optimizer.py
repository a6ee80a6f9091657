"""AdamW with linear warm-up, cosine decay and global-norm clipping, all from optax."""

from __future__ import annotations

from typing import Any

import optax

from moejax import config
from moejax.errors import ConfigError


def schedule(train: config.Train) -> optax.Schedule:
    """Learning rate by step: 0 to the peak over `warmup`, then a cosine to the final rate at `steps`."""
    return optax.warmup_cosine_decay_schedule(
        0.0, train.learning_rate, train.warmup, max(train.steps, train.warmup + 1), train.final_learning_rate
    )


def make(train: config.Train, decay: Any) -> optax.GradientTransformation:
    """The optimiser; `decay` is a tree of booleans like the parameters: which have weight decay."""
    return optax.chain(
        optax.clip_by_global_norm(train.clip_norm),
        optax.adamw(
            schedule(train), b1=train.b1, b2=train.b2, eps=train.epsilon, weight_decay=train.weight_decay, mask=decay
        ),
    )


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
    for name in ("b1", "b2"):
        if not 0 <= getattr(train, name) < 1:
            raise ConfigError(f"train.{name}={getattr(train, name)}: a decay in [0, 1)")
