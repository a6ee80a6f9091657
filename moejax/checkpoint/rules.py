"""Rules by which one tree of arrays becomes another. A tree is a flat dict from path to array, as `manager.flatten` makes it.

A rule says which leaves it reads, which it writes, and what happens in between:

    Rule("mlp/gate_up", "experts/{part:gate|up}", (Unstack("part", 2),))          one leaf becomes two
    Rule("model.{layer}.expert.{e}.w1", "experts/gate", (Stack("e", 0), Stack("layer", 0)))      many become one, in numeric order
    fresh("router/{head:*}")                                                      the target's own value stays
    drop("router/{head:*}")                                                       the source's is left behind

`planning.apply` holds trees to them: every target leaf written exactly once, every source leaf read or dropped. `inverse` turns them round.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from moejax.checkpoint import paths
from moejax.checkpoint.transforms import Goal, Key, Stack, Transform, Unstack
from moejax.errors import UserError


class RuleError(UserError):
    """Rules and trees that do not fit: the message names leaves, rule and remedy."""


@dataclasses.dataclass(frozen=True)
class Rule:
    """Leaves of `source` -> leaves of `target`, both patterns of paths.py. A field of both stands for the same place; one of the source
    alone needs a Stack, one of the target alone an Unstack. Raises ValueError where that is not so."""

    source: str | None
    """None: the steps start from the value that the target tree has."""
    target: str | None
    """None: the leaves are dropped."""
    steps: tuple[Transform, ...] = ()

    def __post_init__(self) -> None:
        if self.source is None or self.target is None:
            return
        read, written = paths.fields(self.source), paths.fields(self.target)
        for kind, alone in ((Stack, read.keys() - written.keys()), (Unstack, written.keys() - read.keys())):
            named = [step.field for step in self.steps if isinstance(step, kind)]
            if sorted(named) != sorted(alone) or any(f.text for f in (read | written).values() if f.name in alone):
                raise ValueError(
                    f"{self}: fields on one side alone, {sorted(alone)}, each need one {kind.__name__} ({named}), and none is text"
                )
        for name in read.keys() & written.keys():
            if len(read[name].words or ()) != len(written[name].words or ()) or read[name].text != written[name].text:
                raise ValueError(
                    f"{self}: {{{name}}} has not as many places on both sides; list as many words, or none"
                )

    def __str__(self) -> str:
        return f"rule {self.source or 'fresh'} -> {self.target or 'dropped'}"

    @property
    def inverse(self) -> Rule:
        """The rule that undoes it. Raises RuleError where a step loses what it read."""
        steps = tuple(step.inverse for step in reversed(self.steps))
        if self.source is None or self.target is None or None in steps:
            lost = (
                "keeps or drops leaves" if self.source is None or self.target is None else "has a step without inverse"
            )
            raise RuleError(f"{self} {lost}: it cannot be turned round; write the rules of the way back")
        return Rule(self.target, self.source, tuple(step for step in steps if step is not None))


def drop(source: str) -> Rule:
    """Leaves that are not wanted."""
    return Rule(source, None)


def fresh(target: str, *steps: Transform) -> Rule:
    """Leaves that keep the target's own value, changed by the steps."""
    return Rule(None, target, steps)


def inverse(rules: Sequence[Rule]) -> tuple[Rule, ...]:
    """The rules of the way back."""
    return tuple(rule.inverse for rule in rules)


@dataclasses.dataclass(frozen=True)
class Job:
    """How one target leaf is made."""

    rule: Rule
    goal: Goal
    reads: Mapping[Key, str]
    """Source leaves in the order of their places; empty where the target's own value is taken."""

    def run(self, read: Callable[[str], Any], own: Any) -> Any:
        """The value, from `read(path)` of each source leaf or from the target's own. Raises RuleError where `own` has another shape
        or type."""
        if self.rule.source is None and isinstance(own, jax.ShapeDtypeStruct):
            raise RuleError(
                f"{self.goal.path}: {self.rule} keeps the target's own value, which has none; give an array"
            )
        parts = {key: read(path) for key, path in self.reads.items()} if self.reads else {(): own}
        shapes = {x.shape for x in parts.values()}
        try:
            for step in self.rule.steps:
                parts = step.parts(parts, self.goal)
            (value,) = parts.values()
        except ValueError as error:
            raise RuleError(f"{self.goal.path}: {self.rule}: {error}; correct the rule's steps") from error
        if value.shape != own.shape or value.dtype != own.dtype:
            raise RuleError(
                f"{self.goal.path} is {own.dtype}{list(own.shape)}, and {self.rule} makes {value.dtype}{list(value.shape)} of "
                f"{len(self.reads)} source leaves of shape {sorted(map(list, shapes))}; correct the rule's steps, or give the target "
                f"the sizes of the source"
            )
        return value
