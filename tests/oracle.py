"""The oracle: a slow, dense, float64 NumPy mixture of experts, written token by token. It shares no code with moejax.

Shapes as in moejax.arrays: x [B,T,D], valid [B,T], router [D,columns], gate_up [E,D,2,F], down [E,F,D].
Routers are in oracle_routers.py, places in oracle_places.py, sums and losses in oracle_losses.py, soft mixtures in oracle_soft.py.
"""

import numpy as np
from oracle_losses import (
    importance,
    load,
    load_balance,
    load_balance_parts,
    load_balance_slope,
    router_z,
    smooth_load,
    squared_variation,
    statistics,
    targets,
)
from oracle_places import Routing, capacity, expert_choice, gates, groups, place, queue, route
from oracle_routers import (
    CHOOSE,
    SCORES,
    Draws,
    Spec,
    distribution,
    hash_ranks,
    limited,
    logsumexp,
    mix32,
    normal,
    selection,
    sigmoid,
    softmax,
    where,
)
from oracle_soft import expert, expert_backward, soft_layer, soft_statistics, soft_weights

__all__ = [
    "CHOOSE", "SCORES", "Draws", "Routing", "Spec", "capacity", "distribution", "expert", "expert_backward",
    "expert_choice", "gates", "groups", "hash_ranks", "importance", "layer", "limited", "load", "load_balance",
    "load_balance_parts", "load_balance_slope", "logsumexp", "mix32", "normal", "place", "queue", "route", "router_z",
    "selection", "sequences", "sigmoid", "smooth_load", "soft_layer", "soft_statistics", "soft_weights", "softmax",
    "squared_variation", "statistics", "targets",
]  # fmt: skip


def sequences(shape):
    """The parts of a load-balance loss by sequence; `groups` are those by group."""
    return [[(b, t) for t in range(shape[1])] for b in range(shape[0])]


def layer(
    x, valid, router, gate_up, down, spec, *, draws=None, wiggle=None, dy=None, coefficients=None, spread=None,
    ids=None, layer=0, bias=None, threshold=None, constant=None, parts=None, z=None, router_bias=None,
):  # fmt: skip
    """Value and gradients of sum(y * dy) + coefficients . balancers.

    Args: router None without a logits head (score constant); wiggle [B,T,D], factors on the router's input (jitter);
      coefficients: of load_balance, router_z, importance, load, missing ones 0; spread [D,X], noisy_topk's second
      router; constant [Zc,D], the vectors of the constant experts in their order; parts: lists of (row, position) over
      which load_balance is averaged, all tokens as one by default; z [B,T,L], what real experts see in place of x (of
      zero-computation ones L = D); router_bias [X]; the others as in `route`.
    Returns: (value, y, sums, {name: gradient of x, router, spread, gate_up, down, constant, z, those that are given}).
    """
    if spec.router == "soft":
        return soft_layer(x, valid, router, gate_up, down, spec, wiggle=wiggle, dy=dy, coefficients=coefficients, z=z)
    given = {"x": x, "router": router, "spread": spread, "gate_up": gate_up, "down": down, "constant": constant, "z": z}
    given |= {"router_bias": router_bias}
    w = {name: np.asarray(a, np.float64) for name, a in given.items() if a is not None}
    d = {name: np.zeros_like(a) for name, a in w.items()}
    x, valid, wiggle = w["x"], np.asarray(valid, bool), 1.0 if wiggle is None else np.asarray(wiggle, np.float64)
    seen = "x" if z is None else "z"
    dy = np.zeros_like(w[seen]) if dy is None else np.asarray(dy, np.float64)
    inputs = x * wiggle
    logits = inputs @ w["router"] if router is not None else np.zeros((*valid.shape, 0))
    logits = logits + w.get("router_bias", 0)
    spreads = inputs @ w["spread"] if spread is not None else None
    routing = route(logits, valid, spec, draws, spreads, ids, layer, bias, threshold)
    s = statistics(logits, valid, routing, spec, spreads)
    value, d_gate, d_logits, d_spreads = balance(logits, valid, routing, spec, spreads, s, coefficients or {}, parts)

    y = np.zeros_like(dy)
    for a in np.flatnonzero(routing.slot >= 0):
        m, e, gate = (routing.row[a], routing.position[a]), routing.expert[a], routing.gate[a]
        name = seen if e < spec.experts else "x"
        if spec.gate_at == "input":
            y[m] += expert(gate * w[name][m], w["gate_up"][e], w["down"][e], spec.clamp)
            slopes = expert_backward(gate * w[name][m], dy[m], w["gate_up"][e], w["down"][e], spec.clamp)
            d_gate[a] += slopes[0] @ w[name][m]
            d[name][m] += gate * slopes[0]
            d["gate_up"][e] += slopes[1]
            d["down"][e] += slopes[2]
            continue
        out = output(w[name][m], e, w, spec)
        y[m] += gate * out
        d_gate[a] += dy[m] @ out
        output_backward(d, m, name, gate * dy[m], e, w, spec)
    for a in np.flatnonzero(routing.asked):
        m = routing.row[a], routing.position[a]
        d_logits[m] += d_gate[a] * routing.slope[a]
        if spread is not None:
            d_spreads[m] += d_gate[a] * routing.slope_spread[a]
    for name, slope in (("router", d_logits), ("spread", d_spreads)):
        if name in w:
            d[name] += np.einsum("btd,bte->de", inputs, slope)
            d["x"] += wiggle * np.einsum("bte,de->btd", slope, w[name])
    if router_bias is not None:
        d["router_bias"] += d_logits.sum((0, 1))
    return value + (y * dy).sum(), y, s, d


def output(x, e, w, spec):
    """One token through expert e, real or of a zero-computation kind."""
    if e < spec.experts:
        return expert(x, w["gate_up"][e], w["down"][e], spec.clamp)
    kind, number = _zero_kind(e, spec)
    return {"identity": lambda: x, "zero": lambda: np.zeros_like(x), "constant": lambda: w["constant"][number]}[kind]()


def output_backward(d, m, name, d_out, e, w, spec):
    """Adds what `d_out` [D], on the output of expert e for the token at m of `name`, gives to the gradients d."""
    if e < spec.experts:
        d_x, d_gate_up, d_down = expert_backward(w[name][m], d_out, w["gate_up"][e], w["down"][e], spec.clamp)
        d[name][m] += d_x
        d["gate_up"][e] += d_gate_up
        d["down"][e] += d_down
        return
    kind, number = _zero_kind(e, spec)
    if kind == "identity":
        d[name][m] += d_out
    if kind == "constant":
        d["constant"][number] += d_out


def _zero_kind(e, spec):
    """The kind of column e, and how many of the same kind come before it."""
    kind = spec.zero[e - spec.experts]
    return kind, spec.zero[: e - spec.experts].count(kind)


def balance(logits, valid, routing, spec, spreads, s, coefficients, parts):
    """The balancers' value, and its slopes by gates [A], logits [B,T,columns] and spread logits [B,T,X] (or None)."""
    c = dict.fromkeys(("load_balance", "router_z", "importance", "load"), 0.0) | coefficients
    assert len(c) == 4, f"no such balancer: {sorted(c)}"
    parts = [list(np.ndindex(valid.shape))] if parts is None else parts
    value = c["load_balance"] * load_balance_parts(logits, valid, routing, spec, parts) + c["router_z"] * router_z(s)
    value += c["importance"] * importance(s, spec) + c["load"] * load(s, spec)

    d_gate = c["importance"] * squared_variation(s["importance"], spec)[1][routing.expert] * routing.asked
    d_logits, d_spreads = np.zeros_like(logits), None if spreads is None else np.zeros_like(spreads)
    d_distribution = c["load_balance"] * load_balance_slope(valid, routing, spec, parts)
    for m in where(valid):
        d_logits[m] += d_distribution[m] @ routing.distribution_slope[m]
        if logits.shape[2]:
            d_logits[m] += c["router_z"] * 2 * logsumexp(logits[m]) * softmax(logits[m]) / s["tokens"]
        if "smooth_load" in s:
            _, by_logits, by_spread = smooth_load(logits[m], spreads[m], routing.normal[m], spec)
            d_load = c["load"] * squared_variation(s["smooth_load"], spec)[1]
            d_logits[m] += d_load @ by_logits
            d_spreads[m] += d_load @ by_spread
    return value, d_gate, d_logits, d_spreads
