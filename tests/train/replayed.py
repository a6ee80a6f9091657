"""The routing state worked out from the sums of a step by plain NumPy, layer by layer, expert by expert. Shares no code with moejax.

`stats` holds the sums of one layer, `state` its state; each rule returns what it makes new.
"""

import numpy as np

from moejax import config
from moejax.moe import quantile


def targets(moe: config.MoE) -> list[float]:
    """Share of the requests that each column should have."""
    zero = len(moe.zero_experts)
    part = zero / (moe.num_experts + zero) if moe.zero_share is None else moe.zero_share
    return [(1 - part) / moe.num_experts] * moe.num_experts + [part / max(zero, 1)] * zero


def at(counts, total, share, rungs) -> float:
    """The value below which `share` of `total` values lie, by the line between the two rungs around it."""
    wanted = share * total
    if total == 0 or counts[0] >= wanted:
        return float(rungs[0]) if total else 0.0
    for low in range(len(rungs) - 1):
        if counts[low + 1] >= wanted:
            part = (wanted - counts[low]) / (counts[low + 1] - counts[low])
            return float(rungs[low] + part * (rungs[low + 1] - rungs[low]))
    return float(rungs[-1])


def sign_bias(state, stats, moe):
    """Up by the step for those with fewer requests than their share, down for those with more."""
    fair = np.array(targets(moe), np.float32) * np.float32(stats["requests"].sum())
    return {"sign_bias": state["sign_bias"] + np.float32(moe.sign_bias) * np.sign(fair - stats["requests"])}


def quantile_bias(state, stats, moe):
    rungs = quantile.SIGMOID if moe.score == "sigmoid" else quantile.LOGITS
    shares = [min(1.0, t * moe.top_k) for t in targets(moe)]
    steps = [at(c, stats["tokens"], s, rungs) for c, s in zip(stats["gap_below"], shares, strict=True)]
    return {"quantile_bias": state["quantile_bias"] + moe.quantile_bias * np.array(steps)}


def load_balance_weight(state, stats, moe):
    """2 % up in a step whose share of requests past 1.25 fair shares exceeds the option, 2 % down in any other; within 64."""
    requests, total = stats["requests"].tolist(), sum(stats["requests"].tolist())
    over = sum(max(0.0, n - 1.25 * t * total) for n, t in zip(requests, targets(moe), strict=True)) / max(total, 1)
    factor = 1.02 if over > moe.load_balance_overflow else 1 / 1.02
    moved = min(64.0, max(1 / 64, state["load_balance_weight"] * factor))
    return {"load_balance_weight": moved if stats["tokens"] else state["load_balance_weight"]}


def sparsity_weight(state, stats, moe):
    mean = moe.top_k / 2 if moe.mean_k is None else moe.mean_k
    direction = np.sign(stats["positive"].sum() / max(stats["tokens"], 1) - mean)
    return {"sparsity_weight": state["sparsity_weight"] * (1.2**direction if stats["tokens"] else 1)}


def threshold(state, stats, moe):
    """A tenth of the way to the quantile that mean_k / X of the tokens pass."""
    mean, width = moe.top_k / 2 if moe.mean_k is None else moe.mean_k, len(state["threshold"])
    rungs = quantile.SIGMOID
    steps = [at(counts, stats["tokens"], 1 - mean / width, rungs) for counts in stats["score_below"]]
    return {"threshold": state["threshold"] + 0.1 * np.array(steps)}


RULES = {f.__name__: f for f in (sign_bias, quantile_bias, load_balance_weight, sparsity_weight, threshold)}
"""By the name of the state."""


def last_fed(state, stats, moe, step):
    least = [moe.alarm_share * t * stats["load"].sum() for t in targets(moe)]
    fed = [n >= a for n, a in zip(stats["load"].tolist(), least, strict=True)]
    return {"last_fed": np.where(fed, step, state["last_fed"])}


def after(state, stats, moe, step):
    """The state of one layer after step number `step` with these sums."""
    moved = {name: value for rule in state if rule in RULES for name, value in RULES[rule](state, stats, moe).items()}
    return moved | last_fed(state, stats, moe, step)
