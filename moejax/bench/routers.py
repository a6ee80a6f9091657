"""Routers side by side in the default experiment, cut short: loss, drops and load of each. docs/routers.md quotes the result."""

from __future__ import annotations

from typing import Any

from moejax import config
from moejax.bench import protocol, timing

ROUTERS: dict[str, dict[str, Any]] = {
    "topk": {},
    "topk_sigmoid": {"score": "sigmoid", "sign_bias": 0.001, "load_balance": 0.0},
    "topk_groups": {"score": "sigmoid", "sign_bias": 0.001, "load_balance": 0.0, "router_groups": 4, "router_groups_kept": 2},
    "topk_sqrt_softplus": {"score": "sqrt_softplus", "sign_bias": 0.001, "load_balance": 0.0},
    "topk_zero_experts": {"zero_experts": ("identity", "zero"), "zero_share": 0.2},
    "topk_reroute": {"reroute": True},
    "topk_priority": {"order": "priority", "allow_noncausal": True},
    "topk_warm_up": {"top_k": 4, "top_k_start": 2, "top_k_steps": 100, "gate_scale": 4.0},
    "topk_mixed_widths": {"hidden_classes": (48, 144)},
    "topk_shared": {"top_k": 1, "renormalize": False, "shared_hidden": 96, "shared_gate": True},
    "topk_latent": {"latent": 32},
    "switch": {"router": "switch", "top_k": 1, "gate_scale": 1.0, "jitter": 0.01},
    "gshard": {"router": "gshard"},
    "noisy_topk": {"router": "noisy_topk", "importance": 0.1, "smooth_load": 0.1, "load_balance": 0.0},
    "top_p": {"router": "top_p", "top_k": 4, "top_p": 0.4},
    "threshold": {"router": "threshold", "top_k": 6, "mean_k": 2.0},
    "relu": {"router": "relu", "top_k": 6, "mean_k": 2.0, "sparsity": 1e-4, "load_balance": 0.0},
    "hash": {"router": "hash", "score": "constant", "load_balance": 0.0, "router_z": 0.0},
    "random": {"router": "random"},
    "dense": {"router": "dense", "top_k": 16, "capacity_factor": None},
    "expert_choice": {"router": "expert_choice", "allow_noncausal": True, "load_balance": 0.0},
    "soft": {"router": "soft", "transport": "einsum", "soft_slots": 16, "capacity_factor": None, "allow_noncausal": True,
             "load_balance": 0.0},
}  # fmt: skip
"""Changes to configs/tiny.py with a capacity factor of 1.25 in training; evaluation is dropless."""

CAPACITY = {"capacity_factor": 1.25}


def run(cfg: config.Config, rounds: int) -> dict[str, Any]:
    """One row a router. Nothing is timed: `rounds` is not read."""
    rows = {}
    for name, options in ROUTERS.items():
        found = protocol.trial(protocol.setting(cfg, name, CAPACITY | options), protocol.FOLDER / "routers")
        rows[name] = {"options": options, **found}
    shape = {"steps": protocol.STEPS, "batch": cfg.data.batch, "context": cfg.data.context, **CAPACITY}
    return {"experiment": shape, "machine": timing.machine(), "rows": rows}


def table(result: dict[str, Any]) -> str:
    """The numbers for a person."""
    e = result["experiment"]
    lines = [
        f"{e['steps']} steps of {e['batch']} x {e['context']} bytes, capacity factor {e['capacity_factor']} in training",
        f"{'router':20} {'bits/byte':>9} {'requests/token':>14} {'dropped':>8} {'MaxVio':>7} {'dead':>5}",
    ]
    for name, row in result["rows"].items():
        lines.append(
            f"{name:20} {row['bits_per_byte']:9.4f} {row['requests_per_token']:14.2f} {100 * row['drop_rate']:6.2f} % "
            f"{row['max_violation']:7.2f} {row['dead']:5}"
        )
    return "\n".join(lines)
