"""The published names that rules speak of, and the shapes that they must have: from patterns and the shapes of our leaves alone."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from moejax.checkpoint import paths, planning
from moejax.checkpoint.rules import Job, Rule


def names(pattern: str) -> list[str]:
    """Every path of a pattern all of whose fields list their places."""
    fields = paths.fields(pattern)
    assert all(field.words is not None for field in fields.values()), pattern
    grid = itertools.product(*(range(len(field.words or ())) for field in fields.values()))
    return [paths.fill(pattern, dict(zip(fields, places, strict=True))) for places in grid]


def writes(rule: Rule, path: str) -> bool:
    """Whether a rule makes the leaf."""
    return rule.target is not None and paths.match(rule.target, path) is not None


def back(rules: Sequence[Rule], targets: Mapping[str, Any]) -> dict[str, Job]:
    """How every published tensor is made of our leaves. Raises RuleError."""
    jobs: dict[str, Job] = {}
    for rule in rules:
        assert rule.source is not None and rule.target is not None
        leaves = [path for path in targets if writes(rule, path)]
        jobs |= planning.plan([rule.inverse], leaves, names(rule.source))
    return jobs


def shapes(rules: Sequence[Rule], targets: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The shape of every published tensor; the tensors of one rule, whose leaves are alike, have one shape."""
    found: dict[str, tuple[int, ...]] = {}
    known: dict[Any, tuple[int, ...]] = {}
    for name, job in back(rules, targets).items():
        leaves = [targets[path] for path in job.reads.values()]
        key = (job.rule, tuple(leaf.shape for leaf in leaves))
        if key not in known:
            known[key] = jax.eval_shape(
                lambda *xs, job=job: _made(job, xs), *(_abstract(leaf) for leaf in leaves)
            ).shape
        found[name] = known[key]
    return found


def _made(job: Job, leaves: Sequence[Any]) -> Any:
    parts = dict(zip(job.reads, leaves, strict=True))
    for step in job.rule.steps:
        parts = step.parts(parts, job.goal)
    (value,) = parts.values()
    return value


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
