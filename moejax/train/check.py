"""Every rule that a config must meet, before a device is touched. Each kind knows its own; this runs them all."""

from __future__ import annotations

import math
from pathlib import Path

from moejax import config, mesh, sharding
from moejax.data import tokenizer
from moejax.data.pipeline import require_windows
from moejax.errors import ConfigError
from moejax.layers import kinds, transfer
from moejax.models import decoder
from moejax.moe import layer, visits, widths
from moejax.train import faults, guard, optimizer, recordings


def check(cfg: config.Config) -> None:
    """Raises ConfigError with the values, the rule and the remedy."""
    mesh.check(cfg.mesh)
    decoder.check(cfg.model)
    transfer.check(cfg.model, cfg.transfer)
    optimizer.check(cfg.train)
    guard.check(cfg.train)
    faults.check(cfg.faults)
    require_windows(cfg.data.skip)
    if kinds.number(cfg.model, "sparse"):
        layer.check(cfg.model.moe, cfg.data.context)
        _check_experts(cfg)
    _check_storage(cfg)
    _check_tensor(cfg)
    _check_positions(cfg)
    _check_data(cfg)
    _check_loop(cfg)


def _check_experts(cfg: config.Config) -> None:
    moe = cfg.model.moe
    classes = widths.of_classes(moe)
    of_class = moe.num_experts // len(classes)
    layout = sharding.LAYOUTS[moe.tensor]
    axes = sharding.axes(layout.expert)
    visits.check(moe, _devices(cfg, axes), _product(cfg, axes))
    if of_class % _devices(cfg, axes):
        raise ConfigError(
            f"{_product(cfg, axes)} does not divide the {of_class} experts of each width (model.moe.num_experts="
            f"{moe.num_experts}, {len(classes)} width(s)); choose one of {_divisors(of_class)}"
        )
    stored = sharding.axes("expert_storage"), sharding.axes(layout.hidden_storage)
    inner = ("model.moe.latent", moe.latent) if moe.latent else ("model.width", cfg.model.width)
    hidden = "model.moe.hidden_classes" if moe.hidden_classes else "model.moe.hidden"
    for (name, width), axes in ((inner, stored[0]), *(((hidden, f), stored[1]) for f in classes)):
        if width % _devices(cfg, axes):
            raise ConfigError(
                f"{_product(cfg, axes)} does not divide {name}={width}, on which experts are cut and stored; choose one of "
                f"{_divisors(width)}"
            )


def _check_storage(cfg: config.Config) -> None:
    """Widths that dense parameters are stored sharded on."""
    parts, model = _devices(cfg, sharding.axes("storage")), cfg.model
    widths = {"model.width": model.width}
    if "latent" in kinds.mixers(model):
        widths |= {"model.latent.rank": model.latent.rank, "model.latent.query_rank": model.latent.query_rank}
    for name, width in widths.items():
        if width % parts:
            raise ConfigError(
                f"mesh.fsdp * mesh.expert = {parts} does not divide {name}={width}, which dense parameters are stored sharded on; "
                f"choose a product from {_divisors(width)}"
            )


def _check_tensor(cfg: config.Config) -> None:
    """What `tensor` cuts outside experts."""
    model, tensor = cfg.model, cfg.mesh.tensor
    cut = {"model.loss_chunk": model.loss_chunk}
    cut |= {f"model.{name}": getattr(model, name) for mixer in kinds.mixers(model) for name in kinds.MIXERS[mixer].cut}
    if kinds.number(model, "dense"):
        cut["model.hidden"] = model.hidden
    if kinds.number(model, "sparse"):
        cut["model.moe.shared_hidden"] = model.moe.shared_hidden
    for name, size in cut.items():
        if size % tensor:
            raise ConfigError(
                f"mesh.tensor={tensor} does not divide {name}={size}, which it cuts; choose one of {_divisors(size)}"
            )


def _check_positions(cfg: config.Config) -> None:
    """Rows are cut into equal pieces of positions, windows are not cut."""
    name = sharding.LAYOUTS[cfg.model.moe.tensor].position if kinds.number(cfg.model, "sparse") else "position"
    axes, context, window = sharding.axes(name), cfg.data.context, cfg.model.moe.group_window
    pieces = _devices(cfg, axes)
    if context % pieces:
        raise ConfigError(
            f"{_product(cfg, axes)} does not divide data.context={context}, whose positions it cuts; choose one of {_divisors(context)}"
        )
    chunk, own = cfg.model.query_chunk, _devices(cfg, sharding.axes("position"))
    if chunk < 0 or (chunk and context // own % chunk):
        raise ConfigError(
            f"model.query_chunk={chunk} does not divide the {context // own} positions that a device attends from "
            f"(data.context={context}); choose one of {_divisors(context // own)}, or 0"
        )
    if window is not None and context // pieces % window:
        raise ConfigError(
            f"{_product(cfg, axes)} leaves {context // pieces} positions on a device, which windows of model.moe.group_window={window} "
            f"do not fill; choose a divisor of {context // pieces}, or null for whole rows"
        )


def _devices(cfg: config.Config, axes: tuple[str, ...]) -> int:
    return math.prod(getattr(cfg.mesh, axis) for axis in axes)


def _product(cfg: config.Config, axes: tuple[str, ...]) -> str:
    """`mesh.expert=8`, or of axes with several devices `mesh.expert * mesh.tensor = 8`."""
    cut = [axis for axis in axes if getattr(cfg.mesh, axis) > 1] or [axes[0]]
    if len(cut) == 1:
        return f"mesh.{cut[0]}={getattr(cfg.mesh, cut[0])}"
    return f"{' * '.join(f'mesh.{axis}' for axis in cut)} = {_devices(cfg, axes)}"


def check_vocabulary(cfg: config.Config) -> None:
    """Every token of the data has a row in the model's embedding."""
    vocabulary = tokenizer.of(cfg.data.tokenizer).vocabulary
    if cfg.model.vocab_size < vocabulary:
        raise ConfigError(
            f"model.vocab_size={cfg.model.vocab_size} is smaller than the {vocabulary} tokens of data.tokenizer="
            f"{cfg.data.tokenizer!r}; set it to at least {vocabulary}"
        )


def _check_data(cfg: config.Config) -> None:
    check_vocabulary(cfg)
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
    if train.record_every < 0 or not 0 <= train.replay_limit <= 1:
        raise ConfigError(
            f"train.record_every={train.record_every}, train.replay_limit={train.replay_limit}: a number of steps (0 for none) and a "
            f"share in [0, 1]"
        )
    if (train.record_every or train.replay) and not kinds.number(cfg.model, "sparse"):
        raise ConfigError(
            f"train.record_every={train.record_every}, train.replay={train.replay!r} without a sparse layer: there is no routing; "
            f"leave both at their defaults"
        )
    if train.replay and not (Path(train.replay).expanduser() / recordings.FOLDER).is_dir():
        raise ConfigError(
            f"train.replay={train.replay} holds no folder {recordings.FOLDER}; give the workdir of a run made with train.record_every=1"
        )
    if train.reference and not Path(train.reference).expanduser().is_file():
        raise ConfigError(
            f"train.reference={train.reference} is not there; give a file routing/probe_STEP.npz of another run, or leave it empty"
        )
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
