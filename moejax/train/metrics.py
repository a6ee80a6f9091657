"""Sums -> named numbers. Pure functions of what a step returns; nothing here knows a mesh or a clock."""

from __future__ import annotations

import math
from typing import Any

import jax
import numpy as np

from moejax import config
from moejax.moe import diagnostics
from moejax.moe.balancers import targets
from moejax.train.losses import Sums

Numbers = dict[str, float | int]


def of_training(sums: Sums, moe: config.MoE) -> Numbers:
    """What metrics.jsonl holds of a training step. `train/loss` is the loss that was differentiated."""
    numbers = {f"train/{name}": float(value) for name, value in sums["parts"].items()}
    numbers["train/bits_per_byte"] = bits_per_byte(sums["nats"], sums.get("bytes", sums["targets"]))
    numbers["train/targets"] = int(sums["targets"])
    numbers["train/gradient_norm"] = float(sums["gradient_norm"])
    numbers["train/skipped_steps"] = int(sums["guard"]["skipped"])
    if "damaged_targets" in sums:
        numbers["data/damaged_targets"] = int(sums["damaged_targets"])
    return numbers | of_routing(sums, moe)


def of_evaluation(sums: Sums, moe: config.MoE, label_names: tuple[str, ...], prefix: str) -> Numbers:
    """Held-out loss in nats per target and bits per byte, whole and by label. Where the sums count no bytes, a target is one."""
    read, of_labels = sums.get("bytes", sums["targets"]), sums.get("label_bytes", sums["label_targets"])
    numbers = {
        f"{prefix}/loss": float(sums["nats"]) / max(int(sums["targets"]), 1),
        f"{prefix}/bits_per_byte": bits_per_byte(sums["nats"], read),
        f"{prefix}/targets": int(sums["targets"]),
    }
    for place, (nats, count) in enumerate(zip(*further_of(sums), strict=True), start=1):
        numbers[f"{prefix}/further_loss/{place}"] = float(nats) / max(int(count), 1)
    if "bytes" in sums:
        numbers[f"{prefix}/bytes"] = int(read)
    for name, nats, count in zip(label_names, sums["label_nats"], of_labels, strict=True):
        if count:
            numbers[f"{prefix}/bits_per_byte/{name}"] = bits_per_byte(nats, count)
    return numbers | {f"{prefix}/{key}": value for key, value in of_routing(sums, moe).items()}


def further_of(sums: Sums) -> tuple[Any, Any]:
    """Nats and targets of every module that predicts a further token; empty where there is none."""
    further = sums.get("further", {"nats": (), "targets": ()})
    return further["nats"], further["targets"]


def bits_per_byte(nats: Any, read: Any) -> float:
    """Of a sum of nats over targets that stand for so many bytes of text."""
    return float(nats) / max(int(read), 1) / math.log(2)


def of_routing(sums: Sums, moe: config.MoE) -> Numbers:
    """One number per quantity over all sparse layers: means, but the worst layer and expert where that is the question.

    drop_rate (and by cause), reroute_rate: share of requests. unserved: share of tokens that reach no expert.
    requests_per_token. load_max: largest load over its target. max_violation, gini: of requests, worst layer and mean.
    rows_sent: share of kept assignments whose expert is on another device; rounds of its exchange, the layer with the most.
    devices_visited: of those that share the experts, by a token, mean and most.
    dead: experts without a token. entropy (nats), confidence, margin: means over tokens. logit_rms.
    """
    numbers: Numbers = {}
    for stats in sums["layers"].values():
        stats = {name: np.asarray(value) for name, value in stats.items()}
        requested, tokens = stats["requested"].sum(), stats["tokens"].sum()
        width = stats["load"].shape[1] * moe.soft_slots

        def share(name: str, whole: Any) -> float:
            return float(stats[name].sum() / max(whole, 1))  # noqa: B023

        violation = diagnostics.max_violation(stats["requests"], targets(moe))
        numbers |= {
            "moe/requested": int(requested),
            "moe/requests_per_token": share("requested", tokens),
            "moe/drop_rate": share("dropped", requested),
            "moe/drop_rate_capacity": share("dropped_capacity", requested),
            "moe/drop_rate_width": share("dropped_width", requested),
            "moe/reroute_rate": share("rerouted", requested),
            "moe/unserved": share("unserved", tokens),
            "moe/load_max": float(1 + diagnostics.max_violation(stats["load"], targets(moe)).max()),
            "moe/max_violation": float(violation.max()),
            "moe/max_violation_mean": float(violation.mean()),
            "moe/gini": float(diagnostics.gini(stats["load"]).mean()),
            "moe/dead": int(diagnostics.dead(stats["load"]).sum()),
            "moe/entropy": share("entropy", tokens),
            "moe/confidence": share("confidence", tokens),
            "moe/margin": share("margin", tokens),
            "moe/logit_rms": math.sqrt(share("squared_logit", tokens * width)),
        }
        if moe.zero_experts:
            numbers["moe/zero_share"] = float(stats["load"][:, moe.num_experts :].sum() / max(stats["load"].sum(), 1))
        if "rounds" in stats:
            numbers["moe/rows_sent"] = share("rows_sent", stats["load"].sum())
            numbers["moe/rounds"] = float((stats["rounds"] / np.maximum(stats["exchanges"], 1)).max())
        if "visits" in stats:
            visits = stats["visits"].sum(axis=0)
            numbers["moe/devices_visited"] = float(visits @ np.arange(len(visits)) / max(tokens, 1))
            numbers["moe/devices_visited_most"] = int(np.flatnonzero(visits).max(initial=0))
        if "mismatched" in stats:
            numbers["moe/mismatched"] = int(stats["mismatched"].sum())
    return numbers


def of_state(routing: Any) -> Numbers:
    """Of the routing state: norm of the selection biases (root mean square over layers and experts), adaptive weights."""
    numbers: Numbers = {}
    for state in routing.values():
        for name, value in state.items():
            if name.endswith("_bias"):
                numbers[f"moe/{name}_rms"] = float(np.sqrt(np.mean(np.square(value, dtype=np.float64))))
            elif name.endswith("_weight"):
                numbers[f"moe/{name}"] = float(np.mean(value, dtype=np.float64))
    return numbers


def to_host(tree: Any) -> Any:
    """Sums, state or recordings as NumPy."""
    return jax.tree.map(np.asarray, tree)


def add(left: Sums | None, right: Sums) -> Sums:
    """Sums of two sets of tokens, in float64 and int64 so that a long evaluation stays exact."""

    def wide(x: np.ndarray) -> np.ndarray:
        return x.astype(np.int64 if np.issubdtype(x.dtype, np.integer) else np.float64)

    right = jax.tree.map(wide, right)
    return right if left is None else jax.tree.map(np.add, left, right)
