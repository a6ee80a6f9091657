"""The oracle's expert mathematics, and soft mixtures of experts (Puigcerver et al. 2023). Shares no code with moejax.

P slots an expert; column e * P + p of the logits is slot p of expert e.
"""

import numpy as np
from oracle_losses import add_token, empty, importance, load_balance, router_z, squared_variation
from oracle_places import groups
from oracle_routers import logsumexp, sigmoid, softmax, where


def expert(x, gate_up, down, clamp=None):
    """One token [D] through one expert: (silu(x gate) * x up) down, with x gate at most clamp and x up within it."""
    gate, up = clamped(x @ gate_up[:, 0], x @ gate_up[:, 1], clamp)
    return (gate * sigmoid(gate) * up) @ down


def clamped(gate, up, clamp):
    return (gate, up) if clamp is None else (np.minimum(gate, clamp), np.clip(up, -clamp, clamp))


def expert_backward(x, d_out, gate_up, down, clamp=None):
    """Gradients of x [D], gate_up [D,2,F] and down [F,D] for the slope d_out [D] of the output; none through a clamp."""
    free_gate, free_up = x @ gate_up[:, 0], x @ gate_up[:, 1]
    gate, up = clamped(free_gate, free_up, clamp)
    s = sigmoid(gate)
    d_a = down @ d_out
    d_gate, d_up = d_a * up * s * (1 + gate * (1 - s)) * (gate == free_gate), d_a * gate * s * (up == free_up)
    d_gate_up = np.stack([np.outer(x, d_gate), np.outer(x, d_up)], axis=1)
    return gate_up[:, 0] @ d_gate + gate_up[:, 1] @ d_up, d_gate_up, np.outer(gate * s * up, d_out)


def soft_weights(logits, valid, spec):
    """dispatch and combine [B,T,E*P]: softmax over the valid tokens of the group, and over the slots; 0 where invalid.

    `combine` is times the gate's scale.
    """
    dispatch, combine = np.zeros_like(logits), np.zeros_like(logits)
    for tokens in _tokens(valid, spec):
        for c in range(logits.shape[2]):
            for m, weight in zip(tokens, softmax(np.array([logits[m][c] for m in tokens])), strict=True):
                dispatch[m][c] = weight
        for m in tokens:
            combine[m] = spec.scale * softmax(logits[m])
    return dispatch, combine


def soft_statistics(logits, valid, spec):
    """The named sums. A column's probability is what its slots have of the combine weights; nothing is dropped."""
    s = empty(spec)
    combine = soft_weights(logits, valid, spec)[1]
    for m in where(valid):
        of_expert = combine[m].reshape(spec.experts, spec.slots).sum(axis=1)
        add_token(s, logits[m], of_expert / spec.scale)
        s["importance"] += of_expert
    fed = len(_tokens(valid, spec)) * spec.slots
    s["requests"] += fed
    s["load"] += fed
    s["requested"] = s["routed"] = fed * spec.experts
    return s


def soft_layer(x, valid, router, gate_up, down, spec, *, wiggle=None, dy=None, coefficients=None, z=None):
    """As oracle.layer: y_s = sum over slots of combine * expert(sum over tokens of dispatch * z)."""
    w = {"x": x, "router": router, "gate_up": gate_up, "down": down, "z": z}
    w = {name: np.asarray(a, np.float64) for name, a in w.items() if a is not None}
    seen = "x" if z is None else "z"
    d = {name: np.zeros_like(a) for name, a in w.items()}
    x, valid, wiggle = w["x"], np.asarray(valid, bool), 1.0 if wiggle is None else np.asarray(wiggle, np.float64)
    dy = np.zeros_like(w[seen]) if dy is None else np.asarray(dy, np.float64)
    inputs = x * wiggle
    logits = inputs @ w["router"]
    dispatch, combine = soft_weights(logits, valid, spec)
    s = soft_statistics(logits, valid, spec)
    c = dict.fromkeys(("load_balance", "router_z", "importance"), 0.0) | (coefficients or {})
    value = c["load_balance"] * load_balance(s, spec) + c["router_z"] * router_z(s)
    value += c["importance"] * importance(s, spec)
    d_importance = c["importance"] * squared_variation(s["importance"], spec)[1]

    y, d_dispatch, d_combine = np.zeros_like(w[seen]), np.zeros_like(logits), np.zeros_like(logits)
    d_combine += np.repeat(d_importance, spec.slots)
    for tokens in _tokens(valid, spec):
        for column in range(logits.shape[2]):
            e = column // spec.slots
            mixed = sum(dispatch[m][column] * w[seen][m] for m in tokens)
            out = expert(mixed, w["gate_up"][e], w["down"][e], spec.clamp)
            d_out = sum(combine[m][column] * dy[m] for m in tokens)
            d_mixed, d_gate_up, d_down = expert_backward(mixed, d_out, w["gate_up"][e], w["down"][e], spec.clamp)
            d["gate_up"][e] += d_gate_up
            d["down"][e] += d_down
            for m in tokens:
                y[m] += combine[m][column] * out
                d[seen][m] += dispatch[m][column] * d_mixed
                d_combine[m][column] += dy[m] @ out
                d_dispatch[m][column] += w[seen][m] @ d_mixed
    d_logits = combine * (d_combine - (combine * d_combine).sum(axis=2, keepdims=True) / spec.scale)
    for tokens in _tokens(valid, spec):
        for column in range(logits.shape[2]):
            mean = sum(dispatch[m][column] * d_dispatch[m][column] for m in tokens)
            for m in tokens:
                d_logits[m][column] += dispatch[m][column] * (d_dispatch[m][column] - mean)
    for m in where(valid):
        d_logits[m] += c["router_z"] * 2 * logsumexp(logits[m]) * softmax(logits[m]) / s["tokens"]
    d["router"] += np.einsum("btd,bte->de", inputs, d_logits)
    d["x"] += wiggle * np.einsum("bte,de->btd", d_logits, w["router"])
    return value + (y * dy).sum(), y, s, d


def _tokens(valid, spec):
    """The valid tokens of each group that has any."""
    each = [[m for m in members if valid[m]] for members in groups(valid.shape, spec)]
    return [tokens for tokens in each if tokens]
