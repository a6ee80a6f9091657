"""Every rule that a config must meet, before a device is touched. Each kind knows its own; this runs them all."""

from __future__ import annotations

import math

from moejax import config, mesh
from moejax.data import tokenizer
from moejax.errors import ConfigError
from moejax.layers import kinds
from moejax.models import decoder
from moejax.moe import layer
from moejax.train import optimizer


def check(cfg: config.Config) -> None:
    """Raises ConfigError with the values, the rule and the remedy."""
    mesh.check(cfg.mesh)
    decoder.check(cfg.model)
    optimizer.check(cfg.train)
    if "sparse" in kinds.channels(cfg.model):
        layer.check(cfg.model.moe, cfg.data.context)
        _check_experts(cfg)
    _check_storage(cfg)
    _check_data(cfg)
    _check_loop(cfg)


def _check_experts(cfg: config.Config) -> None:
    moe = cfg.model.moe
    if moe.num_experts % cfg.mesh.expert:
        raise ConfigError(
            f"mesh.expert={cfg.mesh.expert} does not divide model.moe.num_experts={moe.num_experts}; "
            f"choose one of {_divisors(moe.num_experts)}"
        )
    for name, width in (("model.width", cfg.model.width), ("model.moe.hidden", moe.hidden)):
        if width % cfg.mesh.fsdp:
            raise ConfigError(
                f"mesh.fsdp={cfg.mesh.fsdp} does not divide {name}={width}, which experts are stored sharded on; "
                f"choose one of {_divisors(width)}"
            )


def _check_storage(cfg: config.Config) -> None:
    parts = cfg.mesh.fsdp * cfg.mesh.expert
    if cfg.model.width % parts:
        raise ConfigError(
            f"mesh.fsdp * mesh.expert = {parts} does not divide model.width={cfg.model.width}, which dense parameters are "
            f"stored sharded on; choose a product from {_divisors(cfg.model.width)}"
        )


def _check_data(cfg: config.Config) -> None:
    if cfg.model.vocab_size < tokenizer.VOCABULARY:
        raise ConfigError(
            f"model.vocab_size={cfg.model.vocab_size} is smaller than the {tokenizer.VOCABULARY} tokens of the data; "
            f"set it to at least {tokenizer.VOCABULARY}"
        )
    for name in ("batch", "context"):
        if getattr(cfg.data, name) < 1:
            raise ConfigError(f"data.{name}={getattr(cfg.data, name)}: at least 1")
    if not 0 < cfg.data.heldout < 1:
        raise ConfigError(f"data.heldout={cfg.data.heldout}: a share of the documents between 0 and 1; set 0.05")


def _check_loop(cfg: config.Config) -> None:
    train = cfg.train
    if train.microbatches < 1 or cfg.data.batch % (train.microbatches * cfg.model.moe.group_rows):
        raise ConfigError(
            f"data.batch={cfg.data.batch} is not a multiple of train.microbatches={train.microbatches} times "
            f"model.moe.group_rows={cfg.model.moe.group_rows}; choose microbatches from {_divisors(cfg.data.batch)}"
        )
    for name in ("log_every", "eval_every", "eval_rows", "routing_every"):
        if getattr(train, name) < 1:
            raise ConfigError(f"train.{name}={getattr(train, name)}: at least 1")
    for name in ("every", "keep"):
        if getattr(cfg.checkpoint, name) < 1:
            raise ConfigError(f"checkpoint.{name}={getattr(cfg.checkpoint, name)}: at least 1")
    if not (0 <= train.seed < 2**32 and 0 <= cfg.data.seed < 2**32):
        raise ConfigError(f"train.seed={train.seed}, data.seed={cfg.data.seed}: between 0 and 2**32 - 1")
    if train.profile_steps and not 1 <= train.profile_from <= train.steps + 1 - train.profile_steps:
        raise ConfigError(
            f"train.profile_from={train.profile_from}, train.profile_steps={train.profile_steps}: the profiled steps lie "
            f"between 1 and train.steps={train.steps}"
        )


def _divisors(number: int) -> str:
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return ", ".join(str(d) for d in sorted({*small, *(number // d for d in small)}))
