"""Configs of the sparse layer that are refused: with the option, its value and the remedy, before any device (B6, B31)."""

import re

import cases
import pytest

from moejax import config
from moejax.errors import ConfigError
from moejax.moe import layer
from moejax.moe.routers import ROUTER_OPTIONS, ROUTERS

T = 8
TIGHT = {"capacity_factor": 1.0}


def refused(match=r"^model\.moe\.", **options):
    """The message of the error that these options, on top of the defaults, raise."""
    with pytest.raises(ConfigError, match=match) as error:
        layer.check(config.MoE(**{"num_experts": 8, **options}), context=T)
    return str(error.value)


def test_every_option_of_some_routers_is_set():
    assert set(cases.SET) == set(ROUTER_OPTIONS)


@pytest.mark.parametrize("router", ROUTERS)
def test_b31_an_option_that_does_nothing_is_refused(router):
    """Each option a router does not read names itself, its value, what to leave it at, and who reads it; the others are taken."""
    layer.check(config.MoE(**cases.bare(router)), context=T)
    for name, value in cases.SET.items():
        if name in ROUTERS[router].reads:
            options = {other: cases.SET[other] for other in (name, *cases.TOGETHER.get(name, ()))}
            layer.check(config.MoE(**{**cases.bare(router, name), **options}), context=T)
        else:
            options = {**cases.bare(router), name: value}
            message = refused(rf"model\.moe\.{name}={re.escape(repr(value))} does nothing", **options)
            default = getattr(config.MoE, name)
            assert f"leave it at {default!r} or choose one of " in message
            named = message.split("choose one of ")[1].split(", ")
            assert named == [other for other in ROUTERS if name in ROUTERS[other].reads] != []


NONCAUSAL = [
    {"router": "expert_choice", **TIGHT},
    {"router": "soft", "transport": "einsum"},
    {"order": "choice_major", **TIGHT},
    {"order": "priority", **TIGHT},
    {"order": "priority", "top_k": 1, "renormalize": False, **TIGHT},
    {"sinkhorn": 1},
]


@pytest.mark.parametrize("options", NONCAUSAL, ids=str)
def test_b03_the_noncausal_say_so(options):
    assert "allow_noncausal=True" in refused(next(iter(options)), **options)
    layer.check(config.MoE(num_experts=8, allow_noncausal=True, **options), context=T)


CONSTANT_GATES = [
    {"top_k": 1},
    {"top_k": 1, "score": "sigmoid"},
    {"top_k": 1, "score": "softmax_after", "renormalize": False},
    {"top_k": 2, "score": "softmax_after", "renormalize": False},
    {"top_k": 3, "top_k_start": 1, "top_k_steps": 5},
    {"score": "constant"},
    {"router": "noisy_topk", "top_k": 1},
    {"router": "noisy_topk", "top_k": 3, "top_k_start": 1, "top_k_steps": 5},
    {"router": "hash", "top_k": 1},
    {"router": "random", "top_k": 1, "score": "softmax_after"},
    {"router": "hash", "score": "constant", "renormalize": False},
    {"router": "hash", "score": "constant"},
    {"router": "random", "score": "constant", "load_balance": 0.0},
    {"gate_scale": 0.0},
    {"gate_scale": -1.0},
    {"gate_scale": float("nan")},
    {"gate_scale": float("inf")},
]


@pytest.mark.parametrize("options", CONSTANT_GATES, ids=str)
def test_b06_a_gate_that_cannot_move_is_refused(options):
    message = refused(**options)
    assert re.search(r"\b(set|choose|lower)\b", message), message


IMPOSSIBLE = [
    ({"router": "softmax"}, "router='softmax'.*choose one of topk, switch"),
    ({"score": "tanh"}, "score='tanh'.*choose one of softmax"),
    ({"top_k": 0}, "top_k=0"),
    ({"top_k": 9}, "top_k=9.*lower top_k"),
    ({"num_experts": 0}, "num_experts=0"),
    ({"hidden": 0}, "hidden=0"),
    ({"alarm_after": 0}, "alarm_after=0"),
    ({"alarm_share": 1.0}, "alarm_share=1.0.*set 0.1"),
    ({"shared_hidden": -1}, "shared_hidden=-1"),
    ({"latent": -1}, "latent=-1"),
    ({"shared_gate": True}, "shared_gate=True.*set shared_hidden"),
    ({"activation_clamp": 0.0}, "activation_clamp=0.0.*null"),
    ({"activation_clamp": float("nan")}, "activation_clamp=nan"),
    ({"hidden_classes": (4, 8, 8)}, r"hidden_classes=\(4, 8, 8\).*divides num_experts=8"),
    ({"hidden_classes": (4, 0)}, r"hidden_classes=\(4, 0\)"),
    ({"zero_experts": ("identity", "copy")}, "'copy'; each is one of identity, zero, constant"),
    ({"zero_experts": ("zero",), "zero_share": 1.0}, "zero_share=1.0"),
    ({"jitter": 1.0}, "jitter=1.0.*0.01"),
    ({"router_dropout": 1.0}, "router_dropout=1.0.*set 0"),
    ({"router_groups": 3, "router_groups_kept": 2}, "router_groups=3.*num_experts=8"),
    ({"router_groups": 4, "router_groups_kept": 5}, "router_groups_kept=5.*set both to 1"),
    ({"router_groups": 0, "router_groups_kept": 0}, "router_groups=0"),
    ({"top_k": 5, "router_groups": 4, "router_groups_kept": 2}, "holds 4 experts.*top_k=5; keep more"),
    ({"router_groups": 4, "router_groups_kept": 2, "zero_experts": ("zero",)}, "router_groups=4.*set router_groups=1"),
    ({"top_k_steps": 5}, "top_k_start=None, top_k_steps=5"),
    ({"top_k": 3, "top_k_start": 2}, "top_k_steps=0"),
    ({"top_k": 3, "top_k_start": 4, "top_k_steps": 5}, "top_k_start=4.*top_k=3"),
    ({"router": "switch", "top_k": 2}, "switch chooses 1; set model.moe.top_k=1"),
    ({"router": "gshard", "top_k": 1}, "gshard chooses 2; set model.moe.top_k=2"),
    ({"router": "dense", "top_k": 7}, "set model.moe.top_k=8"),
    (
        {"router": "noisy_topk", "top_k": 3, "top_k_start": 2, "top_k_steps": 5, "smooth_load": 0.1},
        "smooth_load=0.1.*set top_k_start=null",
    ),
    ({"router": "top_p", "top_p": 1.0}, "top_p=1.0.*set 0.5"),
    ({"router": "threshold", "top_k": 2, "mean_k": 3.0}, "mean_k=3.0.*top_k=2"),
    ({"router": "relu"}, "sparsity=0.0.*set model.moe.sparsity=1e-8"),
    ({"router": "relu", "sparsity": 1e-8, "mean_k": 0.0}, "mean_k=0.0"),
    ({"router": "hash", "hash_by": "word"}, "hash_by='word': choose one of token, position"),
    ({"router": "expert_choice", "allow_noncausal": True}, "capacity_factor=null.*set model.moe.capacity_factor"),
    ({"router": "soft", "transport": "einsum", "allow_noncausal": True, "soft_slots": 0}, "soft_slots=0"),
    (
        {"router": "soft", "transport": "einsum", "allow_noncausal": True, **TIGHT},
        "capacity_factor=1.0.*soft_slots; set null",
    ),
    ({"router": "soft", "allow_noncausal": True}, "transport=gather.*set model.moe.transport=einsum"),
    ({"transport": "pigeon"}, "transport='pigeon'.*choose one of einsum"),
    ({"transport": "scatter"}, "transport=scatter.*capacity_factor is null.*transport=gather"),
    ({"order": "alphabetical"}, "order='alphabetical'.*choose one of position"),
    ({"reroute": True}, "reroute=True.*capacity_factor=null.*set a capacity factor"),
    ({"order": "priority", "allow_noncausal": True}, "order=priority.*capacity_factor=null"),
    (
        {"reroute": True, "order": "priority", "allow_noncausal": True, **TIGHT},
        "reroute with model.moe.order=priority.*set order=position",
    ),
    ({"router": "relu", "sparsity": 1e-8, "reroute": True, **TIGHT}, "reroute=True does nothing"),
    ({"orthogonality": 0.1, "top_k": 1, "router": "switch"}, "orthogonality=0.1.*set orthogonality=0"),
    ({"orthogonality": 0.1, "zero_experts": ("zero",)}, "orthogonality=0.1"),
    ({"orthogonality": 0.1, "router": "expert_choice", "allow_noncausal": True, **TIGHT}, "orthogonality=0.1"),
    ({"kernel": "cuda"}, "kernel"),
    ({"group_window": 3}, "group_window=3"),
]


@pytest.mark.parametrize(("options", "match"), IMPOSSIBLE, ids=lambda value: str(value)[:60])
def test_b31_what_cannot_be_is_refused(options, match):
    """The message has the value, the rule and the remedy."""
    refused(match, **options)
