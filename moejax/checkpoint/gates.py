"""Which surgeries on experts preserve the function of a layer: what routers do with equal logits, and how gates add up.

Copies of one expert do what it did if the gates of the chosen copies add up to its gate. So three things are asked of a router: whether it
chooses experts of equal logits together, what the gates of a token add up to, and what becomes of a gate when there are more experts.
All is said of evaluation, which is dropless and without noise.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

from moejax import config
from moejax.moe.routers import ROUTERS
from moejax.moe.scores import SCORES

CHOSEN, ALL, EACH, UNKNOWN = "chosen", "all", "each", "unknown"
"""Gates are parts of a sum over the chosen experts, of a sum over all experts, or each of its own logit alone; or nobody said."""


def _by_score(moe: config.MoE) -> str:
    if moe.renormalize or SCORES[moe.score].after:
        return CHOSEN
    return ALL if moe.score in ("softmax", "constant") else EACH


GATES = {
    "topk": _by_score,
    "hash": _by_score,
    "random": _by_score,
    **dict.fromkeys(("gshard", "noisy_topk"), lambda moe: CHOSEN),
    **dict.fromkeys(("switch", "dense", "top_p", "soft", "expert_choice"), lambda moe: ALL),
    **dict.fromkeys(("threshold", "relu"), lambda moe: EACH),
}
"""What gates are parts of, by router. Of a router that is not here nothing is promised."""

TOP = ("topk", "gshard", "noisy_topk", "dense")
"""Routers that take the k largest logits: with k a multiple of the number of copies they take whole sets of copies."""

ABOVE = ("threshold", "relu", "soft")
"""Routers that judge every expert by itself: of copies all or none."""

BY_ID = ("hash", "random")
"""Routers to which an expert is its number."""

OF_GROUPS = ("capacity_factor", "group_rows", "group_window")
"""Options that decide what an evaluation computes only where a router has no dropless form."""

NEUTRAL = frozenset(
    {
        "jitter", "router_dropout", "eval_capacity_factor", "order", "reroute", "transport", "receive_buffer", "exchange", "tensor",
        "chunks", "kernel", "load_balance", "load_balance_scope", "load_balance_overflow", "router_z", "importance", "smooth_load",
        "score_variance", "orthogonality", "sparsity", "allow_noncausal", "alarm_share", "alarm_after", "zero_share", "mean_k",
    }
)  # fmt: skip
"""Options that no evaluation depends on, beside those of groups."""

BIASES = ("sign_bias", "quantile_bias")
"""Options that matter by being on: they keep a bias on selection."""


def gates_of(moe: config.MoE) -> str:
    """CHOSEN, ALL, EACH or UNKNOWN."""
    return GATES[moe.router](moe) if moe.router in GATES else UNKNOWN


class Verdict(NamedTuple):
    """Whether a function is preserved, and why."""

    preserves: bool
    why: str


def of_upcycling(moe: config.MoE, parts: int) -> Verdict:
    """Whether experts that are copies of a feed-forward layer, each cut into `parts`, are that layer."""
    own = {"shared_hidden": moe.shared_hidden, "zero_experts": moe.zero_experts}
    for name, value in own.items():
        if value:
            return Verdict(False, f"model.moe.{name}={value} adds or takes a part of its own")
    if gates_of(moe) != CHOSEN and moe.router != "dense":
        return Verdict(False, f"the gates of a token do not add up to a constant ({_router(moe)})")
    if parts == 1:
        return Verdict(True, "the gates of a token add up to a constant, which the down projection takes out")
    blocked = _apart(moe)
    if moe.router not in TOP or moe.top_k % parts or blocked:
        return Verdict(False, blocked or f"{_router(moe)} of {parts} parts does not choose whole copies")
    return Verdict(True, f"the {parts} parts of a copy have one router column, so a token chooses whole copies")


def of_growth(old: config.MoE, new: config.MoE) -> Verdict:
    """Whether each expert and its router column, copied equally often, do what they did."""
    changed = _changed(old, new, {"num_experts", "top_k", "gate_scale"})
    times = new.num_experts // old.num_experts
    if changed or new.zero_experts:
        return Verdict(
            False, changed or f"model.moe.zero_experts={new.zero_experts} are not copied, so they are chosen less"
        )
    blocked = _apart(new)
    if blocked:
        return Verdict(False, blocked)
    if new.router in ("topk", "switch") and old.top_k == new.top_k == 1:
        return Verdict(True, "of equal copies a token takes one")
    if new.router not in (*TOP, *ABOVE) or new.router == "gshard":
        return Verdict(False, f"{_router(new)} does not choose all copies of an expert")
    if new.router != "soft" and new.top_k != times * old.top_k:
        return Verdict(
            False,
            f"{_router(new)}: copies of one expert take the places of others; top_k={times * old.top_k} would not",
        )
    return Verdict(True, f"a token that chose an expert chooses its {times} copies")


def growth_factor(old: config.MoE, new: config.MoE) -> float:
    """What the down projections are multiplied by, so that the gates of the chosen copies weigh what the one gate did."""
    times = new.num_experts // old.num_experts
    chosen = times if new.router in ABOVE else max(new.top_k // old.top_k, 1)
    relative = {CHOSEN: 1.0, ALL: times / chosen, EACH: 1 / chosen, UNKNOWN: 1.0}[gates_of(new)]
    return relative * old.gate_scale / new.gate_scale


def of_order(old: config.MoE, new: config.MoE) -> Verdict:
    """Whether experts in another order do what they did."""
    changed = _changed(old, new, set())
    if changed or new.router in BY_ID or new.router not in GATES:
        return Verdict(False, changed or f"{_router(new)} may go by the number of an expert")
    if new.router_groups > new.router_groups_kept:
        return Verdict(False, f"model.moe.router_groups={new.router_groups} are groups of neighbours")
    return Verdict(True, "the router's columns move with their experts")


def _apart(moe: config.MoE) -> str:
    """What may part experts of equal logits; empty if nothing does."""
    if moe.router_groups > moe.router_groups_kept:
        return (
            f"model.moe.router_groups={moe.router_groups} judges groups by their two best experts, which copies become"
        )
    if moe.sinkhorn:
        return f"model.moe.sinkhorn={moe.sinkhorn} scales every column by itself"
    if moe.top_k_start is not None:
        return f"model.moe.top_k_start={moe.top_k_start}: fewer experts are chosen at step 0"
    return ""


def _changed(old: config.MoE, new: config.MoE, accounted: set[str]) -> str:
    """Options with other values on which an evaluation depends."""
    kind = ROUTERS[new.router]
    free = NEUTRAL | accounted | (set() if kind.bounded or kind.soft else set(OF_GROUPS))
    found = []
    for field in dataclasses.fields(config.MoE):
        before, after = getattr(old, field.name), getattr(new, field.name)
        same = bool(before) == bool(after) if field.name in BIASES else before == after
        if not same and field.name not in free:
            found.append(f"model.moe.{field.name}: {before} -> {after}")
    return "; ".join(found)


def _router(moe: config.MoE) -> str:
    return f"router={moe.router}, score={moe.score}, renormalize={moe.renormalize}, top_k={moe.top_k}"
