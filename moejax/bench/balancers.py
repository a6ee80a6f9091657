"""Balancers side by side: steps to even out a skewed router, held-out loss at equal budget, and what they cost."""

from __future__ import annotations

from typing import Any

import jax

from moejax import config
from moejax import mesh as meshes
from moejax.bench import protocol, skew, timing
from moejax.data import batches, prepare
from moejax.data.pipeline import Stream
from moejax.train import state, step

NONE = {"load_balance": 0.0, "router_z": 0.0}
BALANCERS: dict[str, dict[str, Any]] = {
    "none": {},
    "load_balance, global": {"load_balance": 0.01},
    "load_balance, group": {"load_balance": 0.01, "load_balance_scope": "group", "group_window": 32},
    "load_balance, sequence": {"load_balance": 0.01, "load_balance_scope": "sequence"},
    "load_balance, adaptive": {"load_balance": 0.01, "load_balance_overflow": 0.02},
    "importance": {"importance": 0.1},
    "importance and load, noisy_topk": {"router": "noisy_topk", "importance": 0.1, "smooth_load": 0.1},
    "router_z": {"router_z": 0.001},
    "score_variance": {"score_variance": 0.01},
    "orthogonality": {"orthogonality": 0.01},
    "sign_bias, sigmoid": {"score": "sigmoid", "sign_bias": 0.001},
    "quantile_bias, sigmoid": {"score": "sigmoid", "quantile_bias": 0.5},
    "quantile_bias 1.0, sigmoid": {"score": "sigmoid", "quantile_bias": 1.0},
    "quantile_bias, softmax": {"quantile_bias": 0.5},
    "sinkhorn (non-causal)": {"sinkhorn": 3, "allow_noncausal": True},
}
"""Each with everything else off, on router topk unless it names another. `microbatch` is `global` at one microbatch."""

SKEW_LIMIT = 500


def run(cfg: config.Config, rounds: int) -> dict[str, Any]:
    """One row a balancer."""
    rows = {name: {"skewed": _skewed(options)} for name, options in BALANCERS.items()}
    for name, options in BALANCERS.items():
        found = protocol.trial(protocol.setting(cfg, name, NONE | options), protocol.FOLDER / "balancers")
        rows[name]["experiment"] = {k: v for k, v in found.items() if k not in ("load", "curve")}
    for name, overhead in _overheads(cfg, rounds).items():
        rows[name]["overhead"] = overhead
    protocol_is = {"steps": protocol.STEPS, "batch": cfg.data.batch, "context": cfg.data.context}
    skewed_is = {"experts": skew.EXPERTS, "top_k": skew.TOP_K, "tokens": skew.GROUPS * skew.SIZE, "even": skew.EVEN}
    return {
        "skewed": skewed_is | {"limit": SKEW_LIMIT, "learning_rate": skew.LEARNING_RATE},
        "experiment": protocol_is,
        "rounds": rounds,
        "machine": timing.machine(),
        "rows": rows,
    }


def _skewed(options: dict[str, Any]) -> dict[str, Any]:
    """Steps until even, and MaxVio at the start and at the end of them."""
    if options.get("orthogonality"):
        return {"steps": None, "note": "a loss on expert outputs; there are none here"}
    given = NONE | options | {"group_window": None}
    moe = config.MoE(num_experts=skew.EXPERTS, top_k=skew.TOP_K, **given)
    found, violations = skew.steps_until_even(moe, SKEW_LIMIT)
    return {"steps": found, "first": round(violations[0], 3), "last": round(violations[-1], 3)}


def _overheads(cfg: config.Config, rounds: int) -> dict[str, Any]:
    """Train steps of the experiment in turn: the median of the ratio to the step without any balancer, and its spread."""
    mesh = meshes.make(config.Mesh(), jax.devices()[:1])
    rows = Stream(cfg.data, prepare.ensure(cfg.data))
    calls, held = {}, {}
    with jax.set_mesh(mesh):
        host = next(iter(rows.iterate(0, slice(0, cfg.data.batch))))
        batch = batches.put(host, mesh, cfg.data.batch)
        for name, options in BALANCERS.items():
            built = state.build(protocol.setting(cfg, name, NONE | options), mesh)
            held[name] = state.create(built)
            update = step.make_train_step(built, held[name])
            calls[name] = lambda name=name, update=update: _advance(held, name, update, batch)
        return timing.ratios(calls, "none", rounds)


def _advance(held: dict[str, Any], name: str, update: Any, batch: Any) -> Any:
    held[name], sums, _ = update(held[name], batch)
    return sums["nats"]


def table(result: dict[str, Any]) -> str:
    """The numbers for a person."""
    s, e = result["skewed"], result["experiment"]
    lines = [
        f"skewed: {s['experts']} experts, top {s['top_k']}, {s['tokens']} tokens a step, until MaxVio < {s['even']}, at most {s['limit']}",
        f"experiment: {e['steps']} steps of {e['batch']} x {e['context']} bytes; overhead: {result['rounds']} rounds in turn",
        f"{'balancer':34} {'steps':>6} {'MaxVio':>15}  {'bits/byte':>9} {'MaxVio':>7} {'dead':>5}  step over none (10 to 90 %)",
    ]
    for name, row in result["rows"].items():
        first, x, o = row["skewed"], row["experiment"], row["overhead"]
        steps = "-" if first["steps"] is None else str(first["steps"])
        moved = f"{first['first']:.2f} to {first['last']:.2f}" if "first" in first else ""
        lines.append(
            f"{name:34} {steps:>6} {moved:>15}  {x['bits_per_byte']:9.4f} {x['max_violation']:7.2f} {x['dead']:5}  "
            f"{o['median']:.3f} ({o['low']:.3f} to {o['high']:.3f})"
        )
    return "\n".join(lines)
