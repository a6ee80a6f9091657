"""Plans as text for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from moejax.plan import account, pods, sends, temporaries
from moejax.plan.account import Account
from moejax.plan.columns import aligned
from moejax.plan.roofline import NAMES
from moejax.plan.search import Candidate

SHOWN = 12
"""Candidates of a search in its table."""


def of_account(name: str, counted: Account, context: int) -> str:
    """Parameters by part, and what a token costs."""
    active = counted.active_parameters
    rows = [["", "parameters", "active", "bfloat16 GB"]]
    rows += [
        [p.name, f"{p.parameters:,}", f"{p.active:,}", f"{2 * p.parameters / 1e9:,.2f}"]
        for p in counted.parts
        if p.parameters
    ]
    total = counted.total_parameters
    rows.append(["total", f"{total:,}", f"{active['A']:,}", f"{2 * total / 1e9:,.2f}"])
    weights = " · ".join(f"{kind} {account.weight_bytes(counted, kind) / 1e9:,.1f}" for kind in account.BITS)
    return "\n".join(
        [
            name,
            *aligned(rows),
            f"active: A {active['A']:,} with both embeddings · B {active['B']:,} without the input's · C {active['C']:,} with neither",
            f"FLOPs a token at context {context:,}: training {account.training_flops(counted, context) / 1e9:.4g} G, "
            f"decoding at its end {account.decoding_flops(counted, context) / 1e9:.4g} G",
            f"GB: weights in {weights}; training adds {account.gradient_bytes(counted) / 1e9:,.1f} of gradients and "
            f"{account.optimizer_bytes(counted) / 1e9:,.1f} of moments",
            f"cache: {account.cache_bytes_per_token(counted):,} bytes a token, {account.cache_bytes(counted, context) / 1e6:,.1f} MB at "
            f"{context:,} positions",
        ]
    )


HEAD = (
    "topology", "mesh", "micro", "state GB", "temp GB", "used of room", "margin", "bound", "step >=", "MFU <=", "executed", "compiled in",
)  # fmt: skip


def of_plans(plans: Sequence[Mapping[str, Any]]) -> str:
    """A line for each topology, then what each step sends."""
    lines = aligned([list(HEAD), *(_row(plan) for plan in plans)])
    for plan in plans:
        lines += ["", f"{plan['topology']}: mesh {plan['mesh_from']}"]
        lines += _sent(plan) if plan["fits"] else [plan["reason"]]
    return "\n".join(lines)


def _row(plan: Mapping[str, Any]) -> list[str]:
    kept, room = plan["memory"], plan["room"]
    mesh = " ".join(f"{axis}={n}" for axis, n in plan["mesh"].items()) or "one device"
    name = plan["topology"] + (f" x{plan['slices']}" if plan["slices"] > 1 else "")
    head = [name, mesh, f"{plan['microbatches']}"]
    if not plan["fits"]:
        state = sum(plan["arguments_by_kind"].values())
        used = f"{kept['used'] / 1e9:.1f} of {room / 1e9:.1f}"
        return [*head, f"{state / 1e9:.1f}", "", used, "does not fit"] + [""] * 5
    bounds = plan["roofline"]
    return [
        *head, f"{kept['arguments'] / 1e9:.2f}", f"{kept['temporaries'] / 1e9:.2f}", f"{kept['used'] / 1e9:.1f} of {room / 1e9:.1f}",
        f"{plan['margin']:.0%}", NAMES[bounds["bound"]], f"{bounds['seconds']['overlapped']:.3g} s", f"{bounds['flops_utilization']:.0%}",
        f"{bounds['executed']['total']:.2f}", f"{plan['compile_seconds']:.0f} s",
    ]  # fmt: skip


def _sent(plan: Mapping[str, Any]) -> list[str]:
    """Collectives by kind and axes, seconds by resource, transports."""
    rows = [["collective", "axes", "times", "apart", "GB", "GB on the wire"]]
    for c in plan["collectives"]:
        rows.append(
            [c["kind"], sends.named(c), f"{c['times']}", f"{c['apart']}", f"{c['bytes'] / 1e9:,.3f}", f"{c['wire'] / 1e9:,.3f}"]
        )  # fmt: skip
    seconds = plan["roofline"]["seconds"]
    needs = ", ".join(f"{title} {seconds[name]:.3g} s" for name, title in NAMES.items() if seconds[name])
    lines = [
        *aligned(rows),
        f"a step needs at least: {needs}; {plan['roofline']['tokens_per_second']:,.0f} tokens/s at most",
    ]
    executed = plan["roofline"]["executed"]
    lines.append(
        f"FLOPs executed: {plan['executed_flops'] / 1e12:.4g} T a device, {executed['total']:.2f} of the model's (masked scores "
        f"{executed['masked']:.2f}, buffers {executed['buffers']:.2f}, recomputed and other {executed['rest']:.2f})"
    )
    if plan["kernels_without_estimate"]:
        lines.append(
            f"kernels that say nothing of their cost, counted as none: {', '.join(plan['kernels_without_estimate'])}"
        )
    if plan["load"]["slowest"] > 1:
        load = plan["load"]
        lines.append(
            f"measured load: the slowest device has {load['slowest']:.2f} of the mean (worst layer {load['worst']:.2f}, hottest expert "
            f"{load['hottest']:.2f}), {load['rounds']:.2f} rounds, {load['dropped']:.1%} dropped"
        )
    if plan["transports"]:
        each = ", ".join(f"{t['transport']} {1e3 * t['seconds']:.3g} ms" for t in plan["transports"])
        lines.append(f"transports, a layer and microbatch by the estimate: {each}")
    if "estimated_temporaries" in plan:
        apart = plan["estimated_temporaries"] / max(plan["memory"]["temporaries"], 1) - 1
        lines.append(
            f"temporaries were estimated at {plan['estimated_temporaries'] / 1e9:.1f} GB, {apart:+.0%}; estimates only sort out meshes"
        )
    return lines


def of_search(candidates: Sequence[Candidate]) -> str:
    """The ranking, with reasons."""
    rows = [["mesh", "micro", "used GB", "step >=", "MFU <=", "by", "reason"]]
    for c in candidates[:SHOWN]:
        seconds = f"{c.roofline.seconds.serial:.3g} s" if c.fits else ""
        share = f"{c.roofline.flops_utilization:.0%}" if c.fits else ""
        by = "compiler" if c.compiled else "estimate"
        rows.append(
            [pods.search_line(c), f"{c.config.train.microbatches}", f"{c.used / 1e9:.1f}", seconds, share, by, c.reason]
        )
    left = len(candidates) - SHOWN
    more = [f"and {left} more"] if left > 0 else []
    note = f"estimates of temporaries are taken to be {temporaries.MARGIN:.0%} off at most; a step is summed over resources, none hidden"
    return "\n".join([*aligned(rows), *more, note])
