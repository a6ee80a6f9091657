"""Sums -> named numbers. Pure functions of what a step returns; nothing here knows a mesh or a clock."""

from __future__ import annotations

import math
from typing import Any

import jax
import numpy as np

from moejax import config
from moejax.train.losses import Sums, objective

Numbers = dict[str, float | int]


def of_training(sums: Sums, moe: config.MoE) -> Numbers:
    """What metrics.jsonl holds of a training step. `train/loss` is the loss that was differentiated."""
    _, parts = objective(sums, moe)
    numbers = {f"train/{name}": float(value) for name, value in parts.items()}
    numbers["train/bits_per_byte"] = numbers["train/cross_entropy"] / math.log(2)
    numbers["train/targets"] = int(sums["targets"])
    numbers["train/gradient_norm"] = float(sums["gradient_norm"])
    return numbers | of_routing(sums)


def of_evaluation(sums: Sums, label_names: tuple[str, ...], prefix: str) -> Numbers:
    """Held-out loss in nats per target and bits per byte, whole and by label. One byte token is one byte."""
    nats = float(sums["nats"]) / max(int(sums["targets"]), 1)
    numbers = {
        f"{prefix}/loss": nats,
        f"{prefix}/bits_per_byte": nats / math.log(2),
        f"{prefix}/targets": int(sums["targets"]),
    }
    for name, of_label, count in zip(label_names, sums["label_nats"], sums["label_targets"], strict=True):
        if count:
            numbers[f"{prefix}/bits_per_byte/{name}"] = float(of_label) / int(count) / math.log(2)
    return numbers | {f"{prefix}/{key}": value for key, value in of_routing(sums).items()}


def of_routing(sums: Sums) -> Numbers:
    """One number per quantity over all sparse layers: means, but the worst layer and expert where that is the question.

    drop_rate, reroute_rate: share of requests. load_max: largest load of an expert over the layer's mean.
    dead: experts without a token. entropy: nats per token. margin: logit of the last choice less the best left out.
    """
    numbers: Numbers = {}
    for stats in sums["layers"].values():
        stats = {name: np.asarray(value) for name, value in stats.items()}
        requested, tokens = stats["requested"].sum(), stats["tokens"].sum()
        load = stats["load"].astype(np.float64)
        mean = load.mean(axis=1, keepdims=True)
        numbers |= {
            "moe/requested": int(requested),
            "moe/drop_rate": float(stats["dropped"].sum() / max(requested, 1)),
            "moe/reroute_rate": float(stats["rerouted"].sum() / max(requested, 1)),
            "moe/load_max": float((load / np.maximum(mean, 1e-9)).max()),
            "moe/dead": int((load == 0).sum()),
            "moe/entropy": float(stats["entropy"].sum() / max(tokens, 1)),
            "moe/margin": float(stats["margin"].sum() / max(tokens, 1)),
        }
    return numbers


def to_host(sums: Sums) -> Any:
    """The sums as NumPy."""
    return jax.tree.map(np.asarray, sums)


def add(left: Sums | None, right: Sums) -> Sums:
    """Sums of two sets of tokens, in float64 and int64 so that a long evaluation stays exact."""

    def wide(x: np.ndarray) -> np.ndarray:
        return x.astype(np.int64 if np.issubdtype(x.dtype, np.integer) else np.float64)

    right = jax.tree.map(wide, right)
    return right if left is None else jax.tree.map(np.add, left, right)
