"""A Model and its weights -> a folder that transformers loads: in bf16 or fp32, whatever the weights once came in."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np

from moejax import config
from moejax.checkpoint import gates
from moejax.checkpoint.hugging_face import depth, outline, shards
from moejax.checkpoint.hugging_face.families import FAMILIES
from moejax.checkpoint.hugging_face.fields import NEUTRAL, Fields
from moejax.checkpoint.hugging_face.published import Shapes
from moejax.checkpoint.hugging_face.weights import BIAS
from moejax.errors import ConfigError, UserError
from moejax.layers import kinds

DTYPES = {"bfloat16": np.dtype(ml_dtypes.bfloat16), "float32": np.dtype(np.float32)}
MODEL_FREE = ("first", "pattern", "repeats", "unroll", "compute_dtype", "remat", "query_chunk", "loss_chunk", "moe")
"""Options of the model that change nothing at inference, or are compared by what they mean."""
BIASES = ("sign_bias", "quantile_bias")
"""Options that keep a bias on selection, which is published as one."""
MOE_FREE = (*gates.NEUTRAL, *gates.OF_GROUPS, *BIASES, "top_k_start", "top_k_steps")
"""Options of the sparse layer that whoever trains on chooses."""
LEAVES = 2
"""Of ours that are held at a time: a published tensor is made of two at most."""


def describe(model: config.Model, name: str, before: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """config.json of a model as a member of a family. `before` is a config.json whose token ids and the like are kept.

    Raises ConfigError with the options that the family has no fields for: what is written would be read as another model.
    """
    family, published = FAMILIES[name], corrected(model)
    kept = {key: value for key, value in (before or {}).items() if key in NEUTRAL and key != "quantization_config"}
    tree = kept | family.write(published)
    tree |= {
        "model_type": family.written_as or name,
        "architectures": [FAMILIES[family.written_as or name].architecture],
    }
    fields = Fields(tree, "config.json")
    try:
        again = FAMILIES[tree["model_type"]].read(fields)
    except UserError as error:
        raise ConfigError(f"the model is none of family {name}: {error}") from error
    lost = _differences(published, again)
    if lost:
        raise ConfigError(f"family {name} cannot say {'; '.join(lost[:3])}; choose another family, or change the model")
    return tree


def fitting(model: config.Model) -> list[str]:
    """The families that a model is a member of."""
    found = []
    for name, family in FAMILIES.items():
        try:
            describe(model, name)
        except ConfigError:
            continue
        if not family.written_as:
            found.append(name)
    return found


def corrected(model: config.Model) -> config.Model:
    """Biases that balancers keep are published as one correction."""
    moe = model.moe
    kept = moe.selection_bias or any(getattr(moe, name) for name in BIASES)
    return dataclasses.replace(model, moe=dataclasses.replace(moe, selection_bias=kept))


def _differences(model: config.Model, again: config.Model) -> list[str]:
    """Options that matter at inference and were not read back, as `model.path=value`."""
    found = [] if config.layers(model) == config.layers(again) else [f"layers {config.layers(model)}"]
    mixers = kinds.mixers(model)
    unused = kinds.MIXERS.keys() - set(mixers)
    if not kinds.number(model, "dense"):
        unused |= {"hidden"}
    if mixers == ["latent"]:
        unused |= {"head_dim", "kv_heads"}
    found += _unlike(model, again, "model", {*MODEL_FREE, *unused})
    return found + (
        _unlike(model.moe, again.moe, "model.moe", set(MOE_FREE)) if depth.of_channel(model, "sparse") else []
    )


def _unlike(one: Any, other: Any, path: str, free: set[str]) -> list[str]:
    names = [field.name for field in dataclasses.fields(one) if field.name not in free]
    return [f"{path}.{name}={getattr(one, name)!r}" for name in names if getattr(one, name) != getattr(other, name)]


def save(
    folder: Path, model: config.Model, shapes: Shapes, read: Callable[[str], Any], *, family: str, dtype: str = "bfloat16",
    before: Mapping[str, Any] | None = None, shard_bytes: int = shards.SHARD_BYTES,
) -> list[dict[str, str]]:  # fmt: skip
    """Writes a folder; nothing is quantised, and the correction of selection stays float32.

    Args:
      shapes: of our leaves by path of the train state.
      read: a leaf on the host; called for one leaf after another, which is then cut into the tensors that are made of it.
      family: a model_type.
      before: a config.json whose token ids and the like are kept.

    Returns what became of every leaf: `name`, `became`, `why`. Raises ConfigError where the family cannot say the model.
    """
    if dtype not in DTYPES:
        raise UserError(f"dtype={dtype!r}: choose one of {', '.join(DTYPES)}")
    published = corrected(model)
    tree = describe(model, family, before)
    tree |= {"dtype": dtype}
    rules = FAMILIES[str(tree["model_type"])].rules(published)
    left = [path for path in shapes if not any(outline.writes(rule, path) for rule in rules)]
    if left:
        raise ConfigError(
            f"family {family} has no tensor for {', '.join(left[:3])} ({len(left)} leaves); choose another family"
        )
    jobs = outline.back(rules, shapes)
    sizes = outline.shapes(rules, shapes)
    order = sorted(jobs, key=lambda name: tuple(jobs[name].reads.values()))
    described = {
        name: (sizes[name], DTYPES["float32" if BIAS in jobs[name].reads.values() else dtype]) for name in order
    }
    held = functools.lru_cache(maxsize=LEAVES)(lambda path: np.asarray(read(path)))

    def make(name: str) -> np.ndarray:
        shape, kind = described[name]
        value = jobs[name].run(held, jax.ShapeDtypeStruct(shape, np.float32))
        return value.astype(kind)

    shards.write(folder, described, make, tree, shard_bytes=shard_bytes)
    return _report(jobs, dtype)


def _report(jobs: Mapping[str, Any], dtype: str) -> list[dict[str, str]]:
    became: dict[str, list[str]] = {}
    for name, job in jobs.items():
        for path in job.reads.values():
            became.setdefault(path, []).append(name)
    return [
        {"name": path, "became": " ".join(names), "why": "float32 as published" if path == BIAS else f"written in {dtype}, not quantised"}
        for path, names in became.items()
    ]  # fmt: skip
