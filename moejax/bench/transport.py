"""Transports side by side: time, bytes and drops over how experts are spread, how many there are and how uneven the routing is."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moejax import config
from moejax import mesh as meshes
from moejax.bench import collectives, timing
from moejax.bench.layer import NO_SIDE, context_of, vectors
from moejax.errors import UserError
from moejax.layers.feed_forward import Sparse
from moejax.moe.inputs import Mode
from moejax.moe.transport import TRANSPORTS

DEVICES = 8
EXPERTS = (8, 64, 256)
SPREAD = (1, 2, 4, 8)
"""Devices along the expert axis; the others are along `data`."""
CAPACITY = 1.25
"""Of the transports that need one; the others drop nothing."""
RECORDED = Path("benchmarks/routers_cpu.json")


def skews() -> dict[str, Callable[[int], np.ndarray]]:
    """What is added to the router's logits: nothing; the log of the loads that a trained layer had, stretched over the experts; or
    two experts that take all."""
    load = np.sort(json.loads(RECORDED.read_text())["rows"]["topk"]["load"][-1])[::-1]

    def recorded(experts: int) -> np.ndarray:
        return np.log(np.interp(np.linspace(0, 1, experts), np.linspace(0, 1, len(load)), load))

    return {
        "balanced": lambda experts: np.zeros(experts),
        "recorded": recorded,
        "adversarial": lambda experts: np.where(np.arange(experts) < 2, 50.0, 0.0),
    }


def run(cfg: config.Config, rounds: int) -> dict[str, Any]:
    """Forward and backward of the layer of the config on eight devices, one row for each case."""
    with contextlib.suppress(RuntimeError):  # devices exist already, and are counted next
        jax.config.update("jax_num_cpu_devices", DEVICES)
    if len(jax.devices()) < DEVICES:
        raise UserError(f"bench transport needs {DEVICES} devices, here are {len(jax.devices())}")
    if not RECORDED.is_file():
        raise UserError(f"{RECORDED} is missing; start the bench in the root of the repository")
    rows = [row for experts in EXPERTS for spread in SPREAD for row in _together(cfg, experts, spread, rounds)]
    shape = {"tokens": cfg.data.batch * cfg.data.context, "width": cfg.model.width, "top_k": cfg.model.moe.top_k}
    shape |= {"expert_hidden": cfg.model.moe.hidden, "dtype": cfg.model.compute_dtype, "capacity_factor": CAPACITY}
    shape |= {"receive_buffer": cfg.model.moe.receive_buffer, "devices": DEVICES}
    return {"shape": shape, "rounds": rounds, "machine": timing.machine(), "rows": rows}


def _together(cfg: config.Config, experts: int, spread: int, rounds: int) -> list[dict[str, Any]]:
    """All transports and skews on one mesh, timed in turn."""
    mesh = meshes.make(config.Mesh(data=DEVICES // spread, expert=spread), jax.devices()[:DEVICES])
    calls: dict[str, Callable[[], Any]] = {}
    facts: dict[str, dict[str, Any]] = {}
    with jax.set_mesh(mesh):
        for name, kind in TRANSPORTS.items():
            factor = None if kind.dropless else CAPACITY
            moe = dataclasses.replace(cfg.model.moe, num_experts=experts, transport=name, capacity_factor=factor)
            step, arguments = _step(dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, moe=moe)))
            compiled = None
            for skew, bias in skews().items():
                given = arguments(bias(experts))
                compiled = compiled or step.lower(*given).compile()
                key = f"{name} {skew}"
                calls[key] = lambda run=compiled, given=given: run(*given)
                sums = jax.tree.map(lambda s: np.asarray(s).sum(0), compiled(*given)[0][1])
                facts[key] = _facts(sums, compiled.as_text()) | {"transport": name, "routing": skew}
        times = timing.interleaved(calls, rounds)
    where = {"experts": experts, "expert_devices": spread}
    return [
        where
        | facts[key]
        | {"ms": {q: round(1e3 * seconds, 2) for q, seconds in dataclasses.asdict(times[key]).items()}}
        for key in calls
    ]


def _step(cfg: config.Config) -> tuple[Any, Callable[[np.ndarray], tuple[Any, ...]]]:
    """The layer with its gradients, and what it is called with when logits have this bias."""
    module = Sparse(cfg.model, rngs=nnx.Rngs(0))
    graph, parameters = nnx.split(module)
    x = jax.random.normal(jax.random.key(2), (cfg.data.batch, cfg.data.context, cfg.model.width))
    x = vectors(x.at[..., 0].set(1.0).astype(cfg.model.compute_dtype))
    context, mode = context_of(cfg), Mode(training=True, capacity_factor=cfg.model.moe.capacity_factor)

    def value(parameters: Any, x: jax.Array) -> Any:
        y, outcome = nnx.merge(graph, parameters)(x, context, jnp.int32(0), mode, NO_SIDE)
        return jnp.sum(jnp.square(y.astype(jnp.float32))), outcome["sums"]

    def arguments(bias: np.ndarray) -> tuple[Any, ...]:
        weight = parameters["router"]["logits"][...]
        # A constant feature lets the router's own weight carry the bias.
        first = (jnp.arange(weight.shape[0]) == 0)[:, None]
        skewed = jax.device_put(jnp.where(first, jnp.asarray(bias, jnp.float32)[None, :], weight), weight.sharding)
        held = jax.tree.map(lambda leaf: leaf, parameters)
        held["router"]["logits"] = held["router"]["logits"].replace(skewed)
        return held, x

    return jax.jit(jax.value_and_grad(value, argnums=(0, 1), has_aux=True)), arguments


def _facts(sums: dict[str, np.ndarray], text: str) -> dict[str, Any]:
    """Drops, evenness and traffic."""
    load, rounds = sums["load"], 1.0
    found = {
        "max_load_over_mean": round(float(load.max() / load.mean()), 2),
        "drop_rate": round(float(sums["dropped"] / max(int(sums["requested"]), 1)), 4),
    }
    if "rounds" in sums:
        rounds = float(sums["rounds"] / sums["exchanges"])
        found |= {"rounds": round(rounds, 2), "rows_sent": round(float(sums["rows_sent"] / max(int(load.sum()), 1)), 4)}
    return found | {"bytes": _bytes(text, rounds)}


def _bytes(text: str, rounds: float) -> int:
    """Of the collectives of tokens and routing, on one device; a loop's body as often as there are rounds after the first."""
    moved = 0.0
    for c in collectives.of(text):
        weights = "/experts/" in c.name and "all-to-all" not in c.kind
        if not weights and any(f"/{stage}/" in c.name for stage in ("dispatch", "experts", "combine")):
            moved += c.bytes * (rounds - 1 if "/while/" in c.name else 1)
    return round(moved)


def table(result: dict[str, Any]) -> str:
    """The numbers for a person."""
    lines = [", ".join(f"{k} {v}" for k, v in result[part].items()) for part in ("shape", "machine")]
    lines.append(f"forward and backward, {result['rounds']} rounds in turn; ms, median (10 to 90 %); kB of one device")
    lines.append(
        f"{'experts':>7} {'over':>4} {'routing':12} {'transport':10} {'ms':>24} {'kB':>9} {'drops':>7} {'rounds':>6} {'sent':>6}"
    )
    for row in result["rows"]:
        ms = row["ms"]
        shown = f"{ms['median']:.1f} ({ms['low']:.1f} to {ms['high']:.1f})"
        rounds, sent = (format(row[k], ".2f") if k in row else "" for k in ("rounds", "rows_sent"))
        lines.append(
            f"{row['experts']:7} {row['expert_devices']:4} {row['routing']:12} {row['transport']:10} {shown:>24} "
            f"{row['bytes'] / 1e3:9.0f} {100 * row['drop_rate']:5.1f} % {rounds:>6} {sent:>6}"
        )
    return "\n".join(lines)
