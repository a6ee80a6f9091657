"""Experiment file -> frozen, checked dataclasses. Every error is found here or in `train.check`, before a device is touched.

An experiment is a Python file with `get_config() -> ml_collections.ConfigDict`, best made by `default()` and changed
key by key; the command line overrides any key (`--config.model.moe.num_experts=16`). Each option is stated once,
below, with its unit and meaning.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from typing import Any, TypeVar

import ml_collections
from ml_collections import config_dict

from moejax.config_attention import Attention, Latent, Rope
from moejax.config_moe import MoE
from moejax.config_run import Checkpoint, Faults, Watchdog
from moejax.config_transfer import Transfer
from moejax.errors import ConfigError

T = TypeVar("T")
COUNTED = "counted"
"""Section of an experiment file that names parts of a model which are not built: moejax/plan/counted.py."""


@dataclasses.dataclass(frozen=True)
class Model:
    """A decoder: tokens -> logits."""

    vocab_size: int = 264
    """V, rows of the embedding and columns of the output projection."""
    width: int = 64
    """D, width of the residual stream."""
    pattern: tuple[str, ...] = ("attention+sparse",)
    """Layers of one block, each `mixer+channel` with names of moejax.layers.kinds.MIXERS and moejax.layers.kinds.CHANNELS."""
    repeats: int = 4
    """Blocks, scanned over; the depth is len(first) + repeats * len(pattern)."""
    first: tuple[str, ...] = ()
    """Layers before the blocks, named like those of the pattern, each with parameters of its own (DeepSeek-V3 has three)."""
    unroll: int = 1
    """Blocks in one turn of the scan; divides repeats. More is faster to run and slower to compile."""
    heads: int = 4
    """H, query heads."""
    kv_heads: int = 2
    """Key and value heads; divides heads."""
    head_dim: int = 16
    """Width of one head; even, for rotary pairs."""
    rope_theta: float = 10000.0
    """Base of the rotary frequencies."""
    further: int = 0
    """Further tokens that are predicted in training, each by a module with one layer like the last (multi-token prediction)."""
    further_weight: float = 0.3
    """Coefficient of their mean loss (DeepSeek-V3 uses 0.3, then 0.1)."""
    rope: Rope = dataclasses.field(default_factory=Rope)
    attention: Attention = dataclasses.field(default_factory=Attention)
    local: Attention = dataclasses.field(default_factory=Attention)
    latent: Latent = dataclasses.field(default_factory=Latent)
    hidden: int = 192
    """Hidden width of a dense feed-forward layer."""
    norm_epsilon: float = 1e-6
    """Added to the mean square in RMSNorm."""
    compute_dtype: str = "float32"
    """Type of activations and of the weights in a matmul: float32 or bfloat16. Parameters are float32."""
    remat: str = "none"
    """What the backward pass recomputes, a name in moejax.models.remat.POLICIES."""
    query_chunk: int = 0
    """Query positions of a device whose attention scores exist at a time; divides them. 0 for all."""
    loss_chunk: int = 264
    """Vocabulary columns whose logits exist at a time; divides vocab_size."""
    moe: MoE = dataclasses.field(default_factory=MoE)


def layers(model: Model) -> list[str]:
    """`mixer+channel` of every layer from the embedding to the output."""
    return [*model.first, *model.pattern * model.repeats]


def depth(model: Model) -> int:
    """Layers from the embedding to the output."""
    return len(model.first) + model.repeats * len(model.pattern)


@dataclasses.dataclass(frozen=True)
class Data:
    """Where text comes from and how it is cut into rows."""

    source: str = "python"
    """python (the standard library's own sources and texts), languages (twelve paragraphs in each of six languages), files (text or
    jsonl), planted (text of known sources, whose entropy is known), or prepared (a folder of scripts/prepare.py)."""
    files: str = ""
    """Glob of the files of source files; folder of source prepared."""
    tokenizer: str = "bytes"
    """bytes, or a folder with a tokenizer.json and the files beside it that name special ids, as a published model has them."""
    cache: str = "~/.cache/moejax"
    """Folder for tokenised text of the sources python, languages, files and planted."""
    planted_sources: int = 4
    """k, Markov chains; a planted document is drawn from one of them."""
    planted_letters: int = 64
    """n, letters that all of them share; 64 at most."""
    planted_concentration: float = 3.0
    """c, how far a letter decides the next one in a chain: 0 not at all."""
    planted_documents: int = 20000
    """Documents of context - 1 letters, training and held-out together."""
    planted_seed: int = 0
    """Root of the chains and of their documents."""
    context: int = 128
    """T, positions of a row."""
    batch: int = 16
    """B, rows of the global batch of a step."""
    heldout: float = 0.05
    """Share of documents kept for evaluation."""
    seed: int = 0
    """Order of the rows."""
    skip: tuple[int, ...] = ()
    """Batches left out, as first and one past the last, pair after pair: what a run that went back left out, for one that replays it."""
    allow_damaged: bool = False
    """Records that cannot be read become invalid tokens, counted in data/damaged_targets; else they end the run."""


@dataclasses.dataclass(frozen=True)
class Mesh:
    """Devices along each mesh axis. The product must equal the number of devices."""

    data: int = 1
    """Replicas of everything: across slices and slow links."""
    fsdp: int = 1
    """Shards of parameters and optimiser state, gathered at use."""
    expert: int = 1
    """Shards of the experts; divides num_experts."""
    tensor: int = 1
    """Shards of heads, hidden widths and vocabulary; of experts as model.moe.tensor says."""
    context: int = 1
    """Shards of positions; divides data.context."""


@dataclasses.dataclass(frozen=True)
class Train:
    """Optimisation, evaluation and logging."""

    steps: int = 2000
    """Optimiser steps."""
    seed: int = 0
    """Root of initialisation and routing noise."""
    overlap: bool = True
    """Ask the TPU compiler to run collectives under computation; its schedulers for that are experimental. Nothing elsewhere."""
    microbatches: int = 1
    """Parts of the global batch whose gradients are added before the update; divides batch."""
    learning_rate: float = 6e-3
    """Peak learning rate."""
    final_learning_rate: float = 6e-4
    """Learning rate at the last step, reached by a cosine."""
    warmup: int = 50
    """Steps of linear warm-up."""
    b1: float = 0.9
    """AdamW decay of the first moment."""
    b2: float = 0.98
    """AdamW decay of the second moment."""
    epsilon: float = 1e-8
    """AdamW denominator floor."""
    weight_decay: float = 0.1
    """Decoupled weight decay on matrices; vectors and the embedding have none."""
    clip_norm: float = 1.0
    """Limit of the global gradient norm."""
    clip_spike: float = 0.0
    """Limit of the gradient norm as a multiple of its running mean; 0 for none. A spike guard."""
    max_bad_steps: int = 20
    """Steps in a row with a loss, gradient or update that is not finite, after which the run ends. Fewer are skipped and counted."""
    spike: float = 0.0
    """Multiple of the usual loss above which the run goes back to the last checkpoint and leaves out the batches since; 0 for none."""
    max_rollbacks: int = 5
    """Times that a run goes back before it ends."""
    replicas_every: int = 0
    """Steps between comparisons of what must be alike on several devices, bit by bit; 0 for none."""
    log_every: int = 20
    """Steps between lines of metrics.jsonl."""
    eval_every: int = 250
    """Steps between evaluations on eval_rows held-out rows, evenly spaced."""
    eval_rows: int = 512
    """Held-out rows of an evaluation during training; the last one reads them all."""
    routing_every: int = 250
    """Steps between files of routing/: loads per layer and expert."""
    reference: str = ""
    """File routing/probe_STEP.npz of a run on the same data: at evaluations, how many of its choices this router makes; empty for none."""
    record_every: int = 0
    """Steps between files of assignments/: where every token went; 0 for none."""
    replay: str = ""
    """Workdir of a run made with record_every=1 whose routing is played back, gates recomputed; empty for none."""
    replay_limit: float = 0.01
    """Share of a layer's requests that the router may decide otherwise than the replay before the run stops."""
    profile_from: int = 0
    """First step to profile."""
    profile_steps: int = 0
    """Steps to profile, into profile/; 0 for none."""


@dataclasses.dataclass(frozen=True)
class Config:
    """One experiment."""

    name: str = "tiny"
    """Shown in tables and pictures."""
    model: Model = dataclasses.field(default_factory=Model)
    data: Data = dataclasses.field(default_factory=Data)
    mesh: Mesh = dataclasses.field(default_factory=Mesh)
    train: Train = dataclasses.field(default_factory=Train)
    transfer: Transfer = dataclasses.field(default_factory=Transfer)
    checkpoint: Checkpoint = dataclasses.field(default_factory=Checkpoint)
    watchdog: Watchdog = dataclasses.field(default_factory=Watchdog)
    faults: Faults = dataclasses.field(default_factory=Faults)


def default() -> ml_collections.ConfigDict:
    """Every option at its default, for an experiment file to change."""
    return to_tree(Config())


def to_tree(part: Any) -> ml_collections.ConfigDict:
    """A config, or a section of one, for an experiment file to change. `resolve` is the inverse."""
    tree = ml_collections.ConfigDict()
    for field in dataclasses.fields(part):
        value = getattr(part, field.name)
        if dataclasses.is_dataclass(value):
            tree[field.name] = to_tree(value)
        elif types.NoneType in typing.get_args(_hints(type(part))[field.name]):
            kind = next(a for a in typing.get_args(_hints(type(part))[field.name]) if a is not types.NoneType)
            tree[field.name] = config_dict.placeholder(kind)
            tree[field.name] = value
        else:
            tree[field.name] = value
    return tree


def resolve(tree: ml_collections.ConfigDict) -> Config:
    """ConfigDict -> Config. Unknown and ill-typed keys raise ConfigError with the nearest name or the right type, and so does an
    architecture that is counted alone."""
    if COUNTED in tree:
        raise ConfigError(
            f"config.{COUNTED}: this architecture is counted, not built; scripts/plan.py alone reads it. Missing: "
            f"{', '.join(map(str, tree[COUNTED]))}"
        )
    return _resolve(Config, tree, "config")


def to_dict(config: Any) -> dict[str, Any]:
    """Config -> plain nested dict, for config.json."""
    return dataclasses.asdict(config)


def from_dict(tree: dict[str, Any]) -> Config:
    """The inverse of `to_dict`, also for a tree that has been through JSON."""
    return _resolve(Config, tree, "config")


def _hints(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _resolve(kind: type[T], tree: Any, path: str) -> T:
    if not hasattr(tree, "items"):
        raise ConfigError(
            f"{path}={tree!r}: this is a section; set one of its keys, such as {path}.{next(iter(_hints(kind)))}"
        )
    hints = _hints(kind)
    for key in tree:
        if key not in hints:
            near = difflib.get_close_matches(key, hints, n=1, cutoff=0.5)
            remedy = f"did you mean {path}.{near[0]}?" if near else f"known keys: {', '.join(hints)}"
            raise ConfigError(f"{path}.{key} is not an option; {remedy}")
    values = {}
    for key, hint in hints.items():
        if key not in tree:
            continue
        if dataclasses.is_dataclass(hint):
            values[key] = _resolve(hint, tree[key], f"{path}.{key}")
        else:
            values[key] = _typed(tree[key], hint, f"{path}.{key}")
    return kind(**values)


def _typed(value: Any, hint: Any, path: str) -> Any:
    """The value if it has the type, an int as a float where one is wanted, a list as a tuple; else an error."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    for option in options:
        if typing.get_origin(option) is tuple and isinstance(value, (list, tuple)):
            return tuple(_typed(v, typing.get_args(option)[0], path) for v in value)
        if option is float and type(value) is int:
            return float(value)
        if isinstance(option, type) and type(value) is option:
            return value
    wanted = " or ".join("null" if o is types.NoneType else getattr(o, "__name__", str(o)) for o in options)
    raise ConfigError(f"{path}={value!r} is {type(value).__name__}; it must be {wanted}")
