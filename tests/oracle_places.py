"""The oracle's places: groups, capacity, orders, rerouting, and the whole routing of a batch. Shares no code with moejax."""

import dataclasses
from fractions import Fraction

import numpy as np
from oracle_routers import (
    CHOOSE,
    FIXED,
    SCORES,
    Draws,
    Token,
    distribution,
    normal,
    preference,
    ranked,
    score_of,
    selection,
    sigma,
    sigmoid,
)


@dataclasses.dataclass
class Routing:
    """A assignments in coordinate form; of token choice all B*T*K of them by (row, position, choice)."""

    row: np.ndarray
    position: np.ndarray
    expert: np.ndarray
    """[A], after rerouting."""
    original: np.ndarray
    asked: np.ndarray
    """[A], the token is valid and wants this choice."""
    slot: np.ndarray
    """[A], the rank among those of an expert in a group; -1 reaches no expert."""
    rerouted: np.ndarray
    gate: np.ndarray
    slope: np.ndarray
    """[A, columns], d gate / d logits of the token."""
    slope_spread: np.ndarray | None
    """[A, X], d gate / d spread logits; None but for noisy_topk."""
    excess: np.ndarray
    """[B,T], requests past the K that a token has."""
    margin: np.ndarray
    distribution: np.ndarray
    """[B,T,X]."""
    distribution_slope: np.ndarray
    """[B,T,X,columns], d distribution / d logits."""
    normal: np.ndarray | None = None
    """[B,T,X], the normal numbers of noisy_topk in training."""


def groups(shape, spec):
    """Lists of (row, position), each in the order in which tokens come."""
    rows, positions = shape
    if spec.window is not None:
        return [
            [(b, t) for t in range(w, w + spec.window)] for b in range(rows) for w in range(0, positions, spec.window)
        ]
    return [
        [(b, t) for t in range(positions) for b in range(start, start + spec.group_rows)]
        for start in range(0, rows, spec.group_rows)
    ]


def capacity(spec, tokens):
    """ceil(factor * K * tokens / E) and no more than tokens, the factor being the decimal that was written."""
    if spec.factor is None:
        return tokens
    exact = Fraction(str(spec.factor)) * spec.k * tokens / spec.experts
    return min(-(-exact.numerator // exact.denominator), tokens)


def queue(asked, priority, spec):
    """Requests (token, choice) of a group in the order in which they get places. asked [S,K], priority [S]."""
    order = {
        "position": lambda request: request,
        "choice_major": lambda request: (request[1], request[0]),
        "priority": lambda request: (-priority[request[0]], *request),
    }
    return sorted([(s, j) for s, j in np.ndindex(asked.shape) if asked[s, j]], key=order[spec.order])


def place(waiting, expert, asked, preferred, limit, spec):
    """First come, first served; who finds no room may go to the best other expert that has some.

    Args: waiting: requests in order; expert, asked [S,K]; preferred [S,X], as in `preference`; limit: places of each real expert.
    Returns: final expert [S,K], slot [S,K] (-1: none).
    """
    assert not spec.reroute or (spec.order == "position" and spec.router != "relu")
    final, slot = expert.copy(), np.full(expert.shape, -1)
    taken = np.zeros(spec.columns, int)

    def has_room(e):
        return e >= spec.experts or taken[e] < limit

    for s, j in waiting:
        e = final[s, j]
        if spec.reroute and not has_room(e):
            held = {final[s, i] for i in range(final.shape[1]) if asked[s, i]}
            open_ = [c for c in ranked(preferred[s]) if has_room(c) and preferred[s][c] > -np.inf and c not in held]
            e = open_[0] if open_ else e
        if has_room(e):
            final[s, j], slot[s, j] = e, taken[e]
            taken[e] += 1
    return final, slot


def route(logits, valid, spec, draws=None, spread=None, ids=None, layer=0, bias=None, threshold=None):
    """The routing of a batch.

    Args: logits [B,T,columns]; valid [B,T]; draws: uniform numbers; spread [B,T,X], noisy_topk's logits of the noise;
      ids [B,T] token ids and layer, of the hash; bias [X], on the selection only; threshold [X], of its router.
    """
    logits, valid, draws = np.asarray(logits, np.float64), np.asarray(valid, bool), draws or Draws()
    if spec.router == "expert_choice":
        return expert_choice(logits, valid, spec)
    noisy, noise, spread = logits, None, None if spread is None else np.asarray(spread, np.float64)
    if spec.router == "noisy_topk" and draws.router is not None:
        noise = normal(draws.router)
        noisy = logits + noise * np.logaddexp(0, spread)
    scores = {m: SCORES[score_of(spec)](noisy[m], spec) for m in np.ndindex(valid.shape)}
    shape = (*valid.shape, spec.k)
    expert, final, slot, wanted = (np.zeros(shape, kind) for kind in (int, int, int, bool))
    excess, margin = np.zeros(valid.shape, int), np.zeros(valid.shape)
    for members in groups(valid.shape, spec):
        at = tuple(np.array(members).T)
        selected = selection([sigma(noisy[m], spec) for m in members], valid[at], spec, _at(draws.dropout, at), bias)
        preferred = []
        for m, row in zip(members, selected, strict=True):
            name = m[1] if spec.hash_by == "position" else _at(ids, m)
            token = Token(logits[m], scores[m][0], row, _at(draws.router, m), threshold, name, layer)
            expert[m], wanted[m], excess[m], margin[m] = CHOOSE[spec.router](token, spec)
            preferred.append(preference(token, spec))
        asked = wanted[at] & valid[at][:, None]
        waiting = queue(asked, [scores[m][0][expert[m][0]] for m in members], spec)
        limit = capacity(spec, int(valid[at].sum()))
        final[at], slot[at] = place(waiting, expert[at], asked, preferred, limit, spec)
    each = [gates(*scores[m], final[m], wanted[m], spec) for m in np.ndindex(valid.shape)]
    slope = np.array([d for _, d in each]).reshape(*shape, logits.shape[2])
    return Routing(
        *np.indices(shape)[:2].reshape(2, -1),
        expert=final.ravel(),
        original=expert.ravel(),
        asked=(wanted & valid[..., None]).ravel(),
        slot=slot.ravel(),
        rerouted=(final != expert).ravel(),
        gate=np.array([gate for gate, _ in each]).ravel(),
        slope=slope.reshape(final.size, logits.shape[2]),
        slope_spread=spread_slope(slope, spread, noise),
        excess=excess,
        margin=margin,
        **distributions(logits, spec),
        normal=noise,
    )


def _at(values, index):
    return None if values is None else values[index]


def gates(score, slope, expert, wanted, spec):
    """Gates [K] and their slopes [K, columns]: s of each choice, where normalised over the sum of s of the wanted ones.

    Args: score [X], slope [X, columns] = ds/dl; expert, after rerouting, and wanted [K]. gshard counts both choices.
    """
    total, total_slope = 1.0, np.zeros(slope.shape[1])
    if normalised(spec):
        counted = [e for e, w in zip(expert, wanted, strict=True) if w or spec.router == "gshard"]
        total, total_slope = sum(score[e] for e in counted), sum(slope[e] for e in counted)
    gate = np.array([score[e] / total for e in expert])
    d_gate = np.array([slope[e] / total - score[e] / total * (total_slope / total) for e in expert])
    return spec.scale * gate, spec.scale * d_gate


def normalised(spec):
    """Whether gates are divided by a sum over the token's choices."""
    if spec.router in ("gshard", "noisy_topk"):
        return True
    return spec.router not in FIXED and (spec.renormalize or spec.score == "softmax_after")


def spread_slope(slope, spread, noise):
    """d gate / d spread logits [A,X]: the noisy logits are l + noise * softplus(spread)."""
    if spread is None:
        return None
    noise = np.zeros(spread.shape) if noise is None else noise
    each = slope * (noise * sigmoid(spread))[:, :, None]
    return each.reshape(-1, spread.shape[2])


def distributions(logits, spec):
    """P of every token and its slope, by the names of Routing."""
    each = [distribution(logits[m], spec) for m in np.ndindex(logits.shape[:2])]
    shape = (*logits.shape[:2], spec.columns)
    return {
        "distribution": np.array([p for p, _ in each]).reshape(shape),
        "distribution_slope": np.array([d for _, d in each]).reshape(*shape, logits.shape[2]),
    }


def expert_choice(logits, valid, spec):
    """Each expert takes the `limit` valid tokens of the group that want it most (Zhou et al. 2022). A: those taken."""
    entries, gate, slope = [], [], []
    p, d_p = distributions(logits, spec).values()
    for members in groups(valid.shape, spec):
        tokens = [m for m in members if valid[m]]
        for e in range(spec.experts):
            best = ranked([p[m][e] for m in tokens])[: capacity(spec, len(tokens))]
            for rank, m in enumerate(tokens[s] for s in best):
                entries.append((*m, e, rank))
                gate.append(spec.scale * p[m][e])
                slope.append(spec.scale * d_p[m][e])
    row, position, expert, slot = np.array(entries, int).reshape(-1, 4).T
    none = np.zeros(len(row), bool)
    return Routing(
        row, position, expert, expert, ~none, slot, none, np.array(gate), np.array(slope).reshape(-1, logits.shape[2]),
        None, np.zeros(valid.shape, int), np.zeros(valid.shape), p, d_p,
    )  # fmt: skip
