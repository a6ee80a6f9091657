"""Rules on whole trees, strictly.

Every target leaf is written by exactly one rule, every source leaf is read or dropped, shapes and types are those of the target: or one
error says which leaves, which rule and what to do. `plan` needs names alone and says which source leaves a target is made of, in the
order of their numbers, so a checkpoint can be converted a leaf at a time; `apply` does it for trees in memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from moejax.checkpoint import paths
from moejax.checkpoint.rules import Job, Rule, RuleError
from moejax.checkpoint.transforms import Goal, Key

Tree = Mapping[str, Any]


def apply(rules: Sequence[Rule], sources: Tree, targets: Tree, *, same: bool = False) -> dict[str, Any]:
    """The target tree with every leaf made by its rule. `targets` has the arrays of `fresh` leaves, and of all others shape and dtype.

    With `same` leaves that no rule names on either side keep path and value. Raises RuleError.
    """
    jobs = plan(rules, sources, targets, same=same)
    return {path: job.run(sources.__getitem__, targets[path]) for path, job in jobs.items()}


def plan(
    rules: Sequence[Rule], sources: Iterable[str], targets: Iterable[str], *, same: bool = False
) -> dict[str, Job]:
    """The job of every target leaf, from names alone. Raises RuleError with all that is wrong."""
    sources, targets = tuple(sources), tuple(targets)
    if same:
        rules = (*rules, *_same(rules, sources, targets))
    wrong: list[str] = []
    failed: list[Rule] = []
    jobs: dict[str, Job] = {}
    written = {target: [rule for rule in rules if _fits(rule.target, target)] for target in targets}
    for rule in rules:
        mine = [target for target in targets if rule in written[target]]
        found = _jobs(rule, sources, mine)
        problems = [problem for problem in found.values() if isinstance(problem, str)]
        wrong += problems
        failed += [rule] if problems else []
        jobs |= {target: job for target, job in found.items() if isinstance(job, Job)}
    wrong += _not_once(written)
    rest = [path for path in sources if not any(_fits(rule.source, path) for rule in failed)]
    wrong += _not_read(rules, rest, {path for job in jobs.values() for path in job.reads.values()})
    if wrong:
        more = f"; and {len(wrong) - 6} more" if len(wrong) > 6 else ""
        raise RuleError("; ".join(wrong[:6]) + more)
    return {target: jobs[target] for target in targets}


def _fits(pattern: str | None, path: str) -> bool:
    return pattern is not None and paths.match(pattern, path) is not None


def _same(rules: Sequence[Rule], sources: Sequence[str], targets: Sequence[str]) -> list[Rule]:
    """A rule for every leaf of both trees that none names."""
    named = {p for p in sources if any(_fits(r.source, p) for r in rules)}
    named |= {p for p in targets if any(_fits(r.target, p) for r in rules)}
    there = set(targets)
    return [Rule(path, path) for path in sources if path in there and path not in named]


def _jobs(rule: Rule, sources: Sequence[str], targets: Sequence[str]) -> dict[str, Job | str]:
    """The job of each target that the rule writes, or what is wrong with it."""
    if rule.target is None:
        return {}
    if rule.source is None:
        return {target: Job(rule, Goal(target, {}), {}) for target in targets}
    read, written = paths.fields(rule.source), paths.fields(rule.target)
    shared = [name for name in read if name in written]
    leaves = _by_places(rule.source, shared, [f for f in read if f not in written], sources)
    goals = _by_places(rule.target, shared, [f for f in written if f not in read], targets)
    found: dict[str, Job | str] = {}
    for common, mine in goals.items():
        places = dict(zip(shared, common, strict=True))
        reads = leaves.get(common, {})
        missing = _missing(rule.source, places, reads) or _missing(rule.target, places, mine)
        sizes = {name: 1 + max(dict(key)[name] for key in mine) for name in written if name not in read}
        for key, target in mine.items():
            goal = Goal(target, {name: (place, sizes[name]) for name, place in key})
            found[target] = f"{target}: {rule} {missing}" if missing else Job(rule, goal, reads)
    return found


def _by_places(pattern: str, shared: list[str], free: list[str], names: Iterable[str]) -> dict[tuple, dict[Key, str]]:
    """Places of shared fields -> places of the free ones, in order -> path."""
    found: dict[tuple, dict[Key, str]] = {}
    for path in names:
        places = paths.match(pattern, path)
        if places is not None:
            key = tuple((name, int(places[name])) for name in free)
            found.setdefault(tuple(places[name] for name in shared), {})[key] = path
    return {common: dict(sorted(group.items())) for common, group in found.items()}


def _missing(pattern: str, places: Mapping[str, paths.Place], there: Mapping[Key, str]) -> str:
    """What of a full grid of places 0, 1, 2, … is not there, as the end of a sentence; empty if nothing."""
    fields = [f for f in paths.fields(pattern).values() if f.name not in places]
    grid: list[Key] = [()]
    for f in fields:
        number = len(f.words) if f.words is not None else 1 + max((dict(key)[f.name] for key in there), default=0)
        grid = [(*key, (f.name, place)) for key in grid for place in range(number)]
    lacks = [paths.fill(pattern, {**places, **dict(key)}) for key in grid if key not in there]
    return f"lacks {_some(lacks)}; complete the tree or correct the pattern" if lacks else ""


def _not_once(written: Mapping[str, list[Rule]]) -> list[str]:
    """Target leaves without a rule, and with several."""
    none = [target for target, by in written.items() if not by]
    twice = [
        f"{target} is written by {' and by '.join(map(str, by))}; leave one"
        for target, by in written.items()
        if len(by) > 1
    ]
    lacking = f"no rule writes {_some(none)}; add a rule, or fresh(...) to keep the target's own value"
    return twice + ([lacking] if none else [])


def _not_read(rules: Sequence[Rule], sources: Sequence[str], read: set[str]) -> list[str]:
    """Source leaves that nothing reads or drops, and that are read although they are dropped."""
    by = {path: _dropped(rules, path) for path in sources}
    unread = [path for path in sources if path not in read and by[path] is None]
    both = [f"{path} is read, and dropped by {by[path]}; leave one" for path in sources if path in read and by[path]]
    return both + ([f"no rule reads {_some(unread)}; add a rule, or drop(...) to leave them behind"] if unread else [])


def _dropped(rules: Sequence[Rule], path: str) -> Rule | None:
    return next((rule for rule in rules if rule.target is None and _fits(rule.source, path)), None)


def _some(leaves: Sequence[str]) -> str:
    """`a, b, c and 5 more`."""
    return ", ".join(leaves[:3]) + (f" and {len(leaves) - 3} more" if len(leaves) > 3 else "")
