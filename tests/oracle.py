"""The oracle: a slow, dense, float64 NumPy mixture of experts, written token by token. It shares no code with moejax.

Shapes as in moejax.arrays: x [B,T,D], valid [B,T], router [D,E], gate_up [E,D,2,F], down [E,F,D].
"""

import dataclasses
from fractions import Fraction

import numpy as np


@dataclasses.dataclass(frozen=True)
class Spec:
    """What of a configuration changes the mathematics."""

    experts: int
    k: int
    router: str
    renormalize: bool = True
    scale: float = 1.0
    factor: float | None = None
    group_rows: int = 1
    window: int | None = None


@dataclasses.dataclass
class Routing:
    """Per token in batch order; slot is -1 where an assignment reaches no expert."""

    expert: np.ndarray
    gate: np.ndarray
    wanted: np.ndarray
    slot: np.ndarray
    slope: np.ndarray
    """d gate / d logit, [B,T,K,E]."""


def softmax(logits):
    e = np.exp(logits - logits.max())
    return e / e.sum()


def logsumexp(logits):
    return logits.max() + np.log(np.exp(logits - logits.max()).sum())


def choose(logits, spec, uniform=None):
    """One token: its experts, best first with ties to the lower id, their gates, which it asks for, and the gates' slopes."""
    ids = sorted(range(spec.experts), key=lambda e: (-logits[e], e))[: spec.k]
    p = softmax(logits)
    renormalize = {"softmax_topk": spec.renormalize, "switch": False, "gshard": True}[spec.router]
    total = sum(p[e] for e in ids) if renormalize else 1.0
    gate = np.array([p[e] / total for e in ids])
    slope = np.zeros((spec.k, spec.experts))
    for j, e in enumerate(ids):
        for i in range(spec.experts):
            others = (gate[ids.index(i)] if i in ids else 0.0) if renormalize else p[i]
            slope[j, i] = gate[j] * ((i == e) - others)
    wanted = np.ones(spec.k, bool)
    if spec.router == "gshard" and uniform is not None:
        wanted[1] = 2 * gate[1] > uniform
    return np.array(ids), gate * spec.scale, wanted, slope * spec.scale


def groups(shape, spec):
    """Lists of (row, position), each in the order in which places are given."""
    rows, positions = shape
    if spec.window is not None:
        return [
            [(b, t) for t in range(w, w + spec.window)] for b in range(rows) for w in range(0, positions, spec.window)
        ]
    return [
        [(b, t) for t in range(positions) for b in range(first, first + spec.group_rows)]
        for first in range(0, rows, spec.group_rows)
    ]


def capacity(spec, tokens):
    """ceil(factor * k * tokens / experts), the factor being the decimal that was written."""
    if spec.factor is None:
        return tokens
    exact = Fraction(str(spec.factor)) * spec.k * tokens / spec.experts
    return min(-(-exact.numerator // exact.denominator), tokens)


def route(logits, valid, spec, uniform=None):
    """Choices of all tokens, and places first come first served by (position, choice)."""
    rows, positions, experts = logits.shape
    shape = (rows, positions, spec.k)
    r = Routing(
        np.zeros(shape, int), np.zeros(shape), np.zeros(shape, bool), np.full(shape, -1), np.zeros((*shape, experts))
    )
    for b in range(rows):
        for t in range(positions):
            u = None if uniform is None else uniform[b, t]
            r.expert[b, t], r.gate[b, t], r.wanted[b, t], r.slope[b, t] = choose(logits[b, t], spec, u)
    for members in groups((rows, positions), spec):
        limit = capacity(spec, sum(bool(valid[m]) for m in members))
        taken = np.zeros(experts, int)
        for b, t in members:
            for j in range(spec.k):
                e = r.expert[b, t, j]
                if valid[b, t] and r.wanted[b, t, j] and taken[e] < limit:
                    r.slot[b, t, j] = taken[e]
                    taken[e] += 1
    return r


def statistics(logits, valid, routing):
    """The named sums of moejax.moe.stats, in int and float64."""
    rows, positions, experts = logits.shape
    s = {name: 0 for name in ("tokens", "requested", "routed", "rerouted", "dropped")}
    s |= {name: np.zeros(experts, int) for name in ("requests", "load")}
    s |= {"probability": np.zeros(experts), "squared_logsumexp": 0.0, "entropy": 0.0, "margin": 0.0}
    for b in range(rows):
        for t in range(positions):
            if not valid[b, t]:
                continue
            token, p = logits[b, t], softmax(logits[b, t])
            s["tokens"] += 1
            s["probability"] += p
            s["squared_logsumexp"] += logsumexp(token) ** 2
            s["entropy"] -= sum(q * np.log(q) for q in p if q > 0)
            chosen = set(routing.expert[b, t])
            left = [token[e] for e in range(experts) if e not in chosen]
            s["margin"] += min(token[e] for e in chosen) - max(left) if left else 0.0
            for j, e in enumerate(routing.expert[b, t]):
                if routing.wanted[b, t, j]:
                    kept = routing.slot[b, t, j] >= 0
                    s["requested"] += 1
                    s["requests"][e] += 1
                    s["routed" if kept else "dropped"] += 1
                    s["load"][e] += kept
    return s


def load_balance(s):
    """E * sum f P, 1 at perfect balance; no gradient through f."""
    f = s["requests"] / max(s["requested"], 1)
    return len(f) * (f * s["probability"] / max(s["tokens"], 1)).sum()


def router_z(s):
    return s["squared_logsumexp"] / max(s["tokens"], 1)


def expert(x, gate_up, down):
    """One token through one expert, and what its backward needs."""
    gate, up = x @ gate_up[:, 0], x @ gate_up[:, 1]
    sigmoid = 1 / (1 + np.exp(-gate))
    a = gate * sigmoid * up
    return a @ down, (gate, up, sigmoid, a)


def layer(x, valid, router, gate_up, down, spec, *, uniform=None, wiggle=None, dy=None, coefficients=(0.0, 0.0)):
    """Values and gradients of sum(y * dy) + coefficients . (load_balance, router_z).

    Args: uniform [B,T], the numbers gshard draws; wiggle [B,T,D], factors on the router's input (jitter).
    Returns: (value, y, sums, gradients of x, router, gate_up, down).
    """
    x, router, gate_up, down = (np.asarray(a, np.float64) for a in (x, router, gate_up, down))
    wiggle = np.ones_like(x) if wiggle is None else np.asarray(wiggle, np.float64)
    dy = np.zeros_like(x) if dy is None else np.asarray(dy, np.float64)
    logits = (x * wiggle) @ router
    routing = route(logits, valid, spec, uniform)
    s = statistics(logits, valid, routing)
    y, dx, d_router, d_gate_up, d_down = (np.zeros_like(a) for a in (x, x, router, gate_up, down))
    tokens = max(s["tokens"], 1)
    d_probability = coefficients[0] * spec.experts * s["requests"] / max(s["requested"], 1) / tokens
    for b, t in np.argwhere(valid):
        p = softmax(logits[b, t])
        d_logits = p * (d_probability - p @ d_probability) + coefficients[1] * 2 * logsumexp(logits[b, t]) * p / tokens
        for j in range(spec.k):
            if routing.slot[b, t, j] < 0:
                continue
            e, g = routing.expert[b, t, j], routing.gate[b, t, j]
            out, (gate, up, sigmoid, a) = expert(x[b, t], gate_up[e], down[e])
            y[b, t] += g * out
            d_logits = d_logits + (dy[b, t] @ out) * routing.slope[b, t, j]
            d_out = g * dy[b, t]
            d_a = down[e] @ d_out
            d_gate = d_a * up * sigmoid * (1 + gate * (1 - sigmoid))
            d_up = d_a * gate * sigmoid
            d_down[e] += np.outer(a, d_out)
            d_gate_up[e, :, 0] += np.outer(x[b, t], d_gate)
            d_gate_up[e, :, 1] += np.outer(x[b, t], d_up)
            dx[b, t] += gate_up[e, :, 0] @ d_gate + gate_up[e, :, 1] @ d_up
        dx[b, t] += wiggle[b, t] * (router @ d_logits)
        d_router += np.outer(x[b, t] * wiggle[b, t], d_logits)
    value = (y * dy).sum() + coefficients[0] * load_balance(s) + coefficients[1] * router_z(s)
    return value, y, s, (dx, d_router, d_gate_up, d_down)
