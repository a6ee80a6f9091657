"""The oracle's routers: scores, selection scores and choices, token by token in float64 NumPy. Shares no code with moejax.

S tokens of a group, E real experts, X = E + zero-computation columns, K choices a token. l logits [X] of one token,
sigma what scores are ranked by, sigma' the same after biases, Sinkhorn, dropout and the group limit.
"""

import dataclasses
import statistics
from typing import NamedTuple

import numpy as np

GOLDEN = 0x9E3779B9


@dataclasses.dataclass(frozen=True)
class Spec:
    """What of a configuration changes the mathematics. `experts` and `k` are E and K; `zero` the kinds of columns E.."""

    experts: int
    k: int
    router: str
    score: str = "softmax"
    renormalize: bool = True
    scale: float = 1.0
    factor: float | None = None
    group_rows: int = 1
    window: int | None = None
    zero: tuple[str, ...] = ()
    order: str = "position"
    reroute: bool = False
    dropout: float = 0.0
    router_groups: int = 1
    groups_kept: int = 1
    sinkhorn: int = 0
    top_p: float = 0.0
    hash_by: str = "token"
    k_now: int | None = None
    slots: int = 1
    zero_share: float | None = None
    clamp: float | None = None
    groups_best: int = 2
    gate_at: str = "output"

    @property
    def columns(self):
        return self.experts + len(self.zero)


@dataclasses.dataclass
class Draws:
    """Uniform numbers in [0, 1). router [B,T,n]: n = 1 for gshard, X for noisy_topk and random. dropout [B,T,X].

    None is evaluation, but for `random`, which draws always.
    """

    router: np.ndarray | None = None
    dropout: np.ndarray | None = None


def where(mask):
    """The (row, position) of every True."""
    return [(int(b), int(t)) for b, t in np.argwhere(mask)]


# ---- scores: l [X] -> s [X], ds/dl [X,X] ---------------------------------------------------------------------------


def softmax(logits):
    e = np.exp(logits - logits.max())
    return e / e.sum()


def logsumexp(logits):
    return logits.max() + np.log(np.exp(logits - logits.max()).sum())


def sigmoid(logits):
    return np.exp(-np.logaddexp(0, -logits))


def softmax_score(logits, spec):
    p = softmax(logits)
    return p, np.diag(p) - np.outer(p, p)


def softmax_after_score(logits, spec):
    return np.exp(logits), np.diag(np.exp(logits))


def sigmoid_score(logits, spec):
    s = sigmoid(logits)
    return s, np.diag(s * (1 - s))


def sqrt_softplus_score(logits, spec):
    s = np.sqrt(np.logaddexp(0, logits))
    return s, np.diag(sigmoid(logits) / (2 * s))


def constant_score(logits, spec):
    """There need be no logits: `logits` may be empty."""
    return np.full(spec.columns, 1 / spec.k), np.zeros((spec.columns, len(logits)))


def relu_score(logits, spec):
    return np.maximum(logits, 0), np.diag((logits > 0).astype(float))


SCORES = {
    "softmax": softmax_score,
    "softmax_after": softmax_after_score,
    "sigmoid": sigmoid_score,
    "sqrt_softplus": sqrt_softplus_score,
    "constant": constant_score,
    "relu": relu_score,
}
FIXED = {
    "switch": "softmax",
    "gshard": "softmax",
    "noisy_topk": "softmax",
    "top_p": "softmax",
    "threshold": "sigmoid",
    "relu": "relu",
    "dense": "softmax",
    "expert_choice": "softmax",
}
"""Routers whose score is theirs; the others read Spec.score. That of noisy_topk is taken of the noisy logits."""


def score_of(spec):
    return FIXED.get(spec.router, spec.score)


def sigma(logits, spec):
    """What the score is ranked by, [X]; equal everywhere for a constant score."""
    if score_of(spec) in ("sigmoid", "sqrt_softplus", "constant"):
        return SCORES[score_of(spec)](logits, spec)[0]
    return logits


def distribution(logits, spec):
    """P [X] and dP/dl [X, columns]: softmax, or the score divided by its sum (zeros where that is 0)."""
    if score_of(spec) in ("softmax", "softmax_after"):
        return softmax_score(logits, spec)
    if score_of(spec) == "constant":
        return np.full(spec.columns, 1 / spec.columns), np.zeros((spec.columns, len(logits)))
    s, slope = SCORES[score_of(spec)](logits, spec)
    if s.sum() == 0:
        return np.zeros_like(s), np.zeros_like(slope)
    return s / s.sum(), slope / s.sum() - np.outer(s, slope.sum(axis=0)) / s.sum() ** 2


def normal(uniform):
    """The standard normal quantile of each number; -inf at 0."""
    inverse = np.vectorize(lambda u: statistics.NormalDist().inv_cdf(u) if u > 0 else -np.inf, otypes=[float])
    return inverse(np.asarray(uniform, np.float64))


# ---- selection scores: sigma [S,X] of a group -> sigma' [S,X] ------------------------------------------------------


def selection(ranks, valid, spec, dropout=None, bias=None):
    """Balancers' bias, Sinkhorn over the valid tokens, dropout of columns, group limit; in this order."""
    pi = np.array(ranks, np.float64)
    if bias is not None:
        pi += np.asarray(bias, np.float64)
    for _ in range(spec.sinkhorn):
        for e in range(spec.columns if valid.any() else 0):
            pi[valid, e] -= logsumexp(pi[valid, e])
        for s in range(len(pi)):
            pi[s] -= logsumexp(pi[s])
    if dropout is not None:
        pi[np.asarray(dropout) < spec.dropout] = -np.inf
    return np.array([limited(row, spec) for row in pi]).reshape(pi.shape)


def limited(row, spec):
    """One token: only the columns of the `groups_kept` best of `router_groups` contiguous parts, the others -inf.

    A part is worth the sum of its `groups_best` best columns: two in DeepSeek-V3 (2024), one in DeepSeek-V2.
    """
    parts = row.reshape(spec.router_groups, -1)
    worth = [sum(sorted(part, reverse=True)[: spec.groups_best]) for part in parts]
    kept = ranked(worth)[: spec.groups_kept]
    return np.array([row[e] if e // parts.shape[1] in kept else -np.inf for e in range(len(row))])


def ranked(values):
    """Ids, largest value first, ties to the lower id."""
    return sorted(range(len(values)), key=lambda e: (-values[e], e))


# ---- choices of one token -------------------------------------------------------------------------------------------


class Token(NamedTuple):
    """What a router may look at: l [X], s [X], sigma' [X], uniform numbers [n], threshold state [X], and who it is."""

    logits: np.ndarray
    score: np.ndarray
    selection: np.ndarray
    uniform: np.ndarray | None
    threshold: np.ndarray | None
    id: int
    layer: int


class Choice(NamedTuple):
    """K experts, best first, which of them are asked for, the requests beyond K, and how near the choice was."""

    expert: list
    wanted: list
    excess: int = 0
    margin: float = 0.0


def edge(values, order, count):
    """By how much the last of the first `count` beats the next; 0 where there is none or either is not finite."""
    if count == len(order) or not np.isfinite([values[order[count - 1]], values[order[count]]]).all():
        return 0.0
    return values[order[count - 1]] - values[order[count]]


def topk(token, spec):
    order = ranked(token.selection)
    now = spec.k if spec.k_now is None else spec.k_now
    return Choice(order[: spec.k], [j < now for j in range(spec.k)], 0, edge(token.selection, order, spec.k))


def gshard(token, spec):
    """The second is asked for with probability min(1, 2 g2) (Lepikhin et al. 2020, algorithm 1)."""
    order = ranked(token.selection)
    first, second = (token.score[e] for e in order[:2])
    wanted = token.uniform is None or 2 * second / (first + second) > token.uniform[0]
    return Choice(order[:2], [True, bool(wanted)], 0, edge(token.selection, order, 2))


def top_p(token, spec):
    """As many as it takes for the probability before the next to reach top_p (Huang et al. 2024)."""
    order = ranked(token.logits)
    before = [sum(token.score[e] for e in order[:j]) for j in range(len(order))]
    inside = [mass < spec.top_p for mass in before]
    wanted = inside[: spec.k]
    return Choice(order[: spec.k], wanted, sum(inside[spec.k :]), edge(token.logits, order, sum(wanted)))


def above(height, spec):
    """All columns of positive height, highest first."""
    order = ranked(height)
    positive = sum(bool(h > 0) for h in height)
    wanted = [bool(height[e] > 0) for e in order[: spec.k]]
    return Choice(order[: spec.k], wanted, max(positive - spec.k, 0), float(np.abs(height).min()))


def mix32(x):
    """Murmur3's finalizer (Appleby 2011) on one unsigned 32-bit number."""
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) % 2**32
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) % 2**32
    return x ^ (x >> 16)


def hash_ranks(id, layer, columns):
    """24-bit numbers [X] by which an id chooses in a layer."""
    a = mix32((int(id) + GOLDEN * (layer + 1)) % 2**32)
    return [mix32((a + GOLDEN * (e + 1)) % 2**32) >> 8 for e in range(columns)]


def first(values, spec):
    return Choice(ranked(values)[: spec.k], [True] * spec.k)


def beyond(token):
    """How far each score passes its threshold."""
    return token.score - token.threshold


def hashes(token):
    return np.array(hash_ranks(token.id, token.layer, len(token.score)), float)


def preference(token, spec):
    """By what rerouting finds the next best, [X]: sigma', but of routers that choose by something else that."""
    own = {"threshold": beyond, "hash": hashes, "random": lambda token: token.uniform}
    return own[spec.router](token) if spec.router in own else token.selection


CHOOSE = {
    "topk": topk,
    "switch": topk,
    "noisy_topk": topk,
    "gshard": gshard,
    "top_p": top_p,
    "threshold": lambda token, spec: above(beyond(token), spec),
    "relu": lambda token, spec: above(token.logits, spec),
    "hash": lambda token, spec: first(hashes(token), spec),
    "random": lambda token, spec: first(token.uniform, spec),
    "dense": lambda token, spec: Choice(list(range(spec.experts)), [True] * spec.experts),
}
