"""The oracle's statistics of a routing, and the balancers' losses on them with their slopes. Shares no code with moejax.

B rows, T positions, A assignments, X columns (E real, then the zero-computation ones).
"""

import math

import numpy as np
from oracle_routers import logsumexp, ranked, sigmoid, where

COUNTS = ("tokens", "requested", "routed", "rerouted", "dropped_capacity", "dropped_width", "dropped", "unserved")
PER_EXPERT = {"requests": int, "load": int, "probability": float, "importance": float}
REALS = ("squared_logsumexp", "squared_logit", "entropy", "confidence", "margin")


def statistics(logits, valid, routing, spec, spread=None):
    """The named sums over valid tokens. `smooth_load` [X] joins them where noisy_topk is given its spread and noise."""
    s = empty(spec)
    for m in where(valid):
        add_token(s, np.asarray(logits[m], np.float64), routing.distribution[m])
        s["margin"] += routing.margin[m]
        s["dropped_width"] += int(routing.excess[m])
    served = set()
    for a in np.flatnonzero(routing.asked):
        kept = routing.slot[a] >= 0
        s["requests"][routing.original[a]] += 1
        s["importance"][routing.expert[a]] += routing.gate[a]
        s["load"][routing.expert[a]] += kept
        s["routed" if kept and not routing.rerouted[a] else "rerouted" if kept else "dropped_capacity"] += 1
        if kept:
            served.add((routing.row[a], routing.position[a]))
    s["requested"] = int(routing.asked.sum()) + s["dropped_width"]
    s["dropped"] = s["dropped_capacity"] + s["dropped_width"]
    s["unserved"] = s["tokens"] - len(served)
    if spread is not None and routing.normal is not None:
        each = [smooth_load(logits[m], spread[m], routing.normal[m], spec)[0] for m in where(valid)]
        s["smooth_load"] = sum(each, np.zeros(spec.columns))
    return s


def empty(spec):
    """All sums at zero."""
    return (
        dict.fromkeys(COUNTS, 0)
        | {name: np.zeros(spec.columns, kind) for name, kind in PER_EXPERT.items()}
        | dict.fromkeys(REALS, 0.0)
    )


def add_token(s, logits, p):
    """What a valid token adds whatever its choices. Where nothing makes logits (a constant score) they are 0."""
    logits = logits if len(logits) else np.zeros(len(p))
    s["tokens"] += 1
    s["probability"] += p
    s["squared_logsumexp"] += logsumexp(logits) ** 2
    s["squared_logit"] += (logits**2).sum()
    s["entropy"] -= sum(q * np.log(q) for q in p if q > 0)
    s["confidence"] += p.max()


# ---- load balance: f without gradient, P with ------------------------------------------------------------------------


def targets(spec):
    """[X], what share of the requests each column should have."""
    zero = len(spec.zero)
    share = zero / spec.columns if spec.zero_share is None else spec.zero_share
    return np.array([(1 - share) / spec.experts] * spec.experts + [share / max(zero, 1)] * zero)


def load_balance(s, spec=None):
    """sum f P / t, 1 at perfect balance; t is 1/X without a spec."""
    t = 1 / len(s["requests"]) if spec is None else targets(spec)
    f = s["requests"] / max(s["requests"].sum(), 1)
    return (f * s["probability"] / max(s["tokens"], 1) / t).sum()


def load_balance_parts(logits, valid, routing, spec, parts):
    """The mean of the loss of each part that asks for anything; `parts` are lists of (row, position)."""
    losses = []
    for f, tokens in _shares(valid, routing, spec, parts):
        p = sum(routing.distribution[m] for m in tokens) / len(tokens)
        losses.append((f * p / targets(spec)).sum())
    return float(np.mean(losses)) if losses else 0.0


def load_balance_slope(valid, routing, spec, parts):
    """d load_balance_parts / d P of each token, [B,T,X]."""
    slope, shares = np.zeros_like(routing.distribution), _shares(valid, routing, spec, parts)
    for f, tokens in shares:
        for m in tokens:
            slope[m] += f / targets(spec) / len(tokens) / len(shares)
    return slope


def _shares(valid, routing, spec, parts):
    """(f [X], valid tokens) of each part with a request."""
    found = []
    for part in parts:
        members, requests = set(part), np.zeros(spec.columns)
        for a in np.flatnonzero(routing.asked):
            if (routing.row[a], routing.position[a]) in members:
                requests[routing.original[a]] += 1
        if requests.sum():
            found.append((requests / requests.sum(), [m for m in part if valid[m]]))
    return found


# ---- the others ------------------------------------------------------------------------------------------------------


def router_z(s):
    """Mean squared logsumexp (Zoph et al. 2022)."""
    return s["squared_logsumexp"] / max(s["tokens"], 1)


def squared_variation(amounts, spec):
    """Population variance over squared mean of amounts / t (Shazeer et al. 2017, equation 7), and d / d amounts [X]."""
    t = targets(spec)
    v = amounts / t
    mean, variance = v.mean(), v.var()
    if mean == 0:
        return 0.0, np.zeros_like(v)
    slope = 2 * (v - mean) / (len(v) * mean**2) - 2 * variance / (len(v) * mean**3)
    return variance / mean**2, slope / t


def importance(s, spec):
    return squared_variation(s["importance"], spec)[0]


def load(s, spec):
    """Of the smooth load; 0 where there is none (evaluation, other routers)."""
    return squared_variation(s["smooth_load"], spec)[0] if "smooth_load" in s else 0.0


def smooth_load(logits, spread, noise, spec):
    """One token: the probability [X] that a column is chosen if its noise alone were drawn anew.

    Shazeer et al. 2017, equations 8 and 9, the k-th best of the other columns being that of the noisy logits.
    Returns: probability [X], its slopes by logits and by spread [X,X].
    """
    softplus, columns = np.logaddexp(0, spread), spec.columns
    noisy = logits + noise * softplus
    k = spec.k if spec.k_now is None else spec.k_now
    p, by_logits, by_spread = np.ones(columns), np.zeros((columns, columns)), np.zeros((columns, columns))
    for e in range(columns if k < columns else 0):
        bar = [c for c in ranked(noisy) if c != e][k - 1]
        z = (logits[e] - noisy[bar]) / softplus[e]
        p[e] = (1 + math.erf(z / math.sqrt(2))) / 2
        density = math.exp(-(z**2) / 2) / math.sqrt(2 * math.pi) / softplus[e]
        by_logits[e, e] += density
        by_logits[e, bar] -= density
        by_spread[e, e] -= density * z * sigmoid(spread[e])
        by_spread[e, bar] -= density * noise[bar] * sigmoid(spread[bar])
    return p, by_logits, by_spread
