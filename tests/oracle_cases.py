"""Specifications that reach every router, score, order and kind of column, and problems to run the oracle on."""

import numpy as np
import oracle
from oracle import Draws, Spec

CASES = {
    "topk": Spec(4, 2, "topk", factor=1.0),
    "topk-all": Spec(4, 4, "topk", renormalize=False),
    "topk-plain": Spec(4, 3, "topk", renormalize=False, scale=2.5, factor=0.7, group_rows=2, order="choice_major"),
    "topk-after": Spec(5, 2, "topk", "softmax_after", renormalize=False, factor=0.8, order="priority", sinkhorn=2),
    "topk-sigmoid": Spec(5, 2, "topk", "sigmoid", factor=0.9, reroute=True, zero=("identity",), dropout=0.2),
    "topk-sqrt": Spec(
        4, 3, "topk", "sqrt_softplus", scale=1.5, router_groups=2, groups_kept=1, k_now=2, zero=("zero",) * 2
    ),
    "topk-clamped": Spec(4, 2, "topk", factor=1.0, clamp=0.25, zero=("identity",)),
    "topk-zero": Spec(
        3, 2, "topk", zero=("constant", "identity", "constant"), zero_share=0.25, factor=0.6, reroute=True
    ),
    "switch": Spec(4, 1, "switch", renormalize=False, factor=1.0, window=3),
    "gshard": Spec(4, 2, "gshard", factor=0.8, scale=0.5),
    "gshard-rerouted": Spec(4, 2, "gshard", factor=0.6, reroute=True, sinkhorn=1),
    "noisy_topk": Spec(5, 2, "noisy_topk", factor=0.8, reroute=True, scale=1.5),
    "noisy_topk-warm": Spec(4, 3, "noisy_topk", k_now=2, zero=("identity",)),
    "noisy_topk-all": Spec(3, 3, "noisy_topk"),
    "top_p": Spec(5, 3, "top_p", top_p=0.7, factor=0.8, scale=1.25),
    "threshold": Spec(5, 2, "threshold", factor=0.9, scale=1.5),
    "relu": Spec(5, 2, "relu", zero=("identity",), factor=0.9),
    "threshold-rerouted": Spec(4, 2, "threshold", factor=0.6, reroute=True, zero=("constant",)),
    "hash": Spec(5, 2, "hash", factor=0.8, reroute=True),
    "hash-constant": Spec(4, 3, "hash", "constant", hash_by="position", factor=0.7),
    "random-rerouted": Spec(4, 2, "random", factor=0.6, reroute=True),
    "random": Spec(5, 2, "random", "sigmoid", renormalize=False, factor=0.8, order="priority"),
    "random-after": Spec(4, 2, "random", "softmax_after"),
    "dense": Spec(4, 4, "dense", scale=1.5),
    "expert_choice": Spec(4, 2, "expert_choice", factor=0.75, scale=1.5, group_rows=2),
    "soft": Spec(3, 3, "soft", slots=2, scale=1.5, group_rows=2),
    "soft-clamped": Spec(3, 3, "soft", clamp=0.25),
}
"""Those that clamp the activation also give the experts a z of their own to see."""
COEFFICIENTS = {"load_balance": 0.5, "router_z": 0.25, "importance": 0.75, "load": 0.6}


def problem(spec, seed=0):
    """(valid, the differentiated arrays by name, the rest of layer's arguments)."""
    rng = np.random.default_rng(seed)
    rows, positions, width, n = 2, 6, 3, spec.columns * spec.slots
    shapes = {"x": (rows, positions, width), "router": (width, n)}
    shapes |= {"gate_up": (spec.experts, width, 2, 2), "down": (spec.experts, 2, width)}
    if spec.router == "noisy_topk":
        shapes["spread"] = (width, n)
    if "constant" in spec.zero:
        shapes["constant"] = (spec.zero.count("constant"), width)
    if spec.clamp is not None:
        shapes["z"] = shapes["x"]
    arrays = {name: rng.normal(size=shape) for name, shape in shapes.items()}
    if spec.score == "constant":
        arrays["router"] = None
    draws = Draws(rng.random((rows, positions, 1 if spec.router == "gshard" else n)), rng.random((rows, positions, n)))
    rest = {"draws": draws, "ids": rng.integers(0, 99, (rows, positions)), "layer": 1}
    rest |= {"wiggle": rng.uniform(0.9, 1.1, shapes["x"]), "dy": rng.normal(size=shapes["x"])}
    rest |= {"bias": rng.normal(size=n) / 4, "threshold": rng.uniform(0.2, 0.7, n), "coefficients": COEFFICIENTS}
    return rng.random((rows, positions)) < 0.8, arrays, rest


def run(valid, arrays, spec, **rest):
    parts = ("x", "router", "gate_up", "down")
    x, *weights = (arrays[name] for name in parts)
    others = {name: a for name, a in arrays.items() if name not in parts}
    return oracle.layer(x, valid, *weights, spec, **others, **rest)


def routed(logits, spec, **rest):
    """One row of tokens [T,X], all valid: (Routing, sums, what a token's choices are, as lists [T][K])."""
    logits = np.array(logits, float)[None]
    routing = oracle.route(logits, np.ones(logits.shape[:2], bool), spec, **rest)
    sums = oracle.statistics(logits, np.ones(logits.shape[:2], bool), routing, spec)

    def table(name):
        return getattr(routing, name).reshape(-1, spec.k).tolist()

    return routing, sums, table
