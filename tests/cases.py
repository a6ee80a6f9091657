"""The configs that the batteries run: one line for each case, and no name of a table of the library without one.

A new router joins by a line here and its twin in oracle_routers.CHOOSE. The first case of a router is the demanding one that
batteries of compiled layers use.
"""

from moejax import config
from moejax.moe.balancers import BALANCERS
from moejax.moe.places import ORDERS
from moejax.moe.routers import ROUTERS
from moejax.moe.scores import SCORES

E, F = 8, 4
SHARED = {"num_experts": E, "hidden": F, "top_k": 2, "capacity_factor": 0.75, "allow_noncausal": True}
"""Options of every case that does not say otherwise: tight, so that places are short."""

PLUS = {"zero_experts": ("identity", "constant", "zero"), "zero_share": 0.25}
LIMITED = {"router_groups": 4, "router_groups_kept": 2}
BEST = {**LIMITED, "router_groups_best": 1}
WARM = {"top_k": 3, "top_k_start": 2, "top_k_steps": 4}
UNTRAINED = {"score": "constant", "load_balance": 0.0, "router_z": 0.0}

CASES = {
    "topk": {"reroute": True, **PLUS},
    "topk-plain": {"top_k": 3, "renormalize": False, "gate_scale": 2.5, "order": "choice_major", "orthogonality": 0.1},
    "topk-one": {"top_k": 1, "renormalize": False, "order": "priority", "sign_bias": 0.001},
    "topk-all": {"top_k": E, "score": "softmax_after"},
    "topk-sigmoid": {"score": "sigmoid", "reroute": True, "sign_bias": 0.001, "router_dropout": 0.1, **LIMITED, **WARM},
    "topk-input": {"score": "sigmoid", "renormalize": False, "gate_at": "input", "router_bias": True, "selection_bias": True, **BEST},
    "topk-sqrt": {"score": "sqrt_softplus", "quantile_bias": 0.5, "router_dropout": 0.2, **PLUS},
    "topk-warm": {"score": "softmax_after", "order": "priority", "importance": 0.1, **WARM},
    "topk-sinkhorn": {"sinkhorn": 2, "score_variance": 0.1, "order": "choice_major"},
    "switch": {"top_k": 1, "reroute": True, "sign_bias": 0.001, **PLUS},
    "switch-first": {"top_k": 1, "order": "choice_major", "router_dropout": 0.2, **LIMITED},
    "gshard": {"reroute": True, "router_dropout": 0.1},
    "gshard-half": {"gate_scale": 0.5, "order": "priority", "quantile_bias": 0.5},
    "noisy_topk": {"reroute": True, "importance": 0.1, "smooth_load": 0.1},
    "noisy_topk-warm": {"gate_scale": 1.5, "sign_bias": 0.001, "router_dropout": 0.1, **WARM, **PLUS},
    "top_p": {"top_k": 3, "top_p": 0.7, "reroute": True, "gate_scale": 1.5, **PLUS},
    "top_p-priority": {"top_p": 0.4, "order": "priority"},
    "threshold": {"top_k": 3, "reroute": True, **PLUS},
    "threshold-choice": {"order": "choice_major", "gate_scale": 1.5},
    "relu": {"top_k": 3, "sparsity": 1e-8, **PLUS},
    "relu-priority": {"sparsity": 1e-8, "gate_scale": 1.5, "order": "priority"},
    "hash": {"reroute": True, "score": "sigmoid"},
    "hash-constant": {"hash_by": "position", **UNTRAINED},
    "random": {"reroute": True, "renormalize": False},
    "random-after": {"score": "softmax_after", "order": "priority", "gate_scale": 1.5},
    "dense": {"top_k": E, "gate_scale": 1.5},
    "expert_choice": {"gate_scale": 1.5, "importance": 0.1},
    "soft": {"transport": "einsum", "capacity_factor": None, "soft_slots": 2, "gate_scale": 1.5, "importance": 0.1},
}  # fmt: skip
"""By name: the router, and what sets the case apart."""


def configure(case: str, **more) -> config.MoE:
    """The config of a case, some options replaced."""
    return config.MoE(**{**SHARED, "router": case.split("-")[0], **CASES[case], **more})


CONFIGS = {case: configure(case) for case in CASES}


def first(router: str) -> str:
    """The first case of a router, whose name it bears."""
    return next(case for case in CASES if case.split("-")[0] == router)


SET = {
    "score": "sigmoid", "renormalize": False, "router_dropout": 0.1, "router_groups": 4, "router_groups_kept": 2, "router_groups_best": 1,
    "top_k_start": 2, "top_k_steps": 5, "top_p": 0.4, "mean_k": 1.5, "hash_by": "position", "soft_slots": 2, "order": "choice_major",
    "reroute": True, "zero_experts": ("identity",), "zero_share": 0.2, "selection_bias": True, "sign_bias": 0.001, "quantile_bias": 0.5,
    "sinkhorn": 2, "smooth_load": 0.1, "sparsity": 1e-8,
}  # fmt: skip
"""Every option that only some routers read, set to something."""
TOGETHER = {
    "router_groups": ("router_groups_kept",), "router_groups_kept": ("router_groups",), "top_k_start": ("top_k_steps",),
    "router_groups_best": ("router_groups", "router_groups_kept"),
    "top_k_steps": ("top_k_start",), "zero_share": ("zero_experts",),
}  # fmt: skip
"""Options that mean nothing alone."""


def bare(router: str, option: str = "") -> dict:
    """Options of a router with nothing set that it can do without, for one more of SET."""
    own = CONFIGS[first(router)]
    needed = {name: getattr(own, name) for name in ("top_k", "transport", "capacity_factor", "sparsity")}
    return {**SHARED, "router": router, **needed, **({"top_k": 3} if option.startswith("top_k_") else {})}


def missing(cases: dict[str, config.MoE]) -> list[str]:
    """What of the library no case tries."""
    moes = list(cases.values())
    tried = {
        "router": (ROUTERS, {moe.router for moe in moes}),
        "score": (SCORES, {moe.score for moe in moes}),
        "order": (ORDERS, {moe.order for moe in moes}),
        "balancer": (BALANCERS, {name for name in BALANCERS if any(getattr(moe, name, 0) for moe in moes)}),
    }
    return [f"{kind} {name}" for kind, (table, names) in tried.items() for name in table if name not in names]
