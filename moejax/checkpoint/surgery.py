"""What surgeries on train states share: rules for parameters become rules for the whole state, and the run starts anew.

A surgery turns the flat train state of one model into the start of another. Parameters change by rules; optimiser moments go the same way;
steps and schedules begin at 0. Each surgery declares whether the new model computes the same function.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any, NamedTuple

from moejax import config
from moejax.checkpoint import planning
from moejax.checkpoint.entries import Scale
from moejax.checkpoint.gates import Verdict
from moejax.checkpoint.planning import Tree
from moejax.checkpoint.rules import Rule, drop, fresh
from moejax.checkpoint.transforms import Transform
from moejax.errors import ConfigError
from moejax.layers import kinds

ADAM = "optimizer/1/0"
"""The part of the optimiser state that has moments, and the count that corrects their bias, which goes with them."""

BEGUN_ANEW = ("step", "guard/{leaf:*}", "optimizer/0/{leaf:*}", "optimizer/1/{part:1..9}/{leaf:*}")
"""The count of steps, the guards, and the schedule."""

FREE = ("pattern", "unroll", "hidden", "moe", "compute_dtype", "remat", "query_chunk", "loss_chunk")
"""Options of the model that a surgery may change, or that change no parameter."""


class Part(NamedTuple):
    """A rule for parameters, whose optimiser moments go the same way."""

    source: str | None
    target: str | None
    steps: tuple[Transform, ...] = ()
    factor: float = 1.0
    """Multiplies the parameters. Their gradients are divided by it."""
    noise: tuple[Transform, ...] = ()
    """For the parameters alone."""


@dataclasses.dataclass(frozen=True)
class Surgery:
    """Rules for a whole train state, and what they do to the function."""

    name: str
    rules: tuple[Rule, ...]
    preserves: bool
    """Whether the logits stay the same at evaluation, without drops, up to rounding."""
    why: str

    def __call__(self, source: Tree, target: Tree) -> dict[str, Any]:
        """The flat state that the new run starts from. `target` is its flat state of step 0, which keeps what is fresh; leaves
        that no rule names stay what they were. Raises RuleError."""
        return planning.apply(self.rules, source, target, same=True)


def make(name: str, parts: Iterable[Part], routing: Iterable[Rule], verdict: Verdict, *, moments: bool) -> Surgery:
    """A surgery from rules for parameters and rules for the routing state; without `moments` the optimiser begins anew."""
    parts = tuple(parts)
    rules = [_rule(part, "parameters", part.factor, part.noise) for part in parts]
    begun = [*BEGUN_ANEW]
    if moments:
        for name_of, power in (("mu", -1), ("nu", -2)):
            rules += [_rule(part, f"{ADAM}/{name_of}", part.factor**power) for part in parts]
    else:
        begun.append(f"{ADAM}/{{leaf:*}}")
    anew = [rule for pattern in begun for rule in (drop(pattern), fresh(pattern))]
    return Surgery(name, (*rules, *routing, *anew), *verdict)


def _rule(part: Part, root: str, factor: float, noise: tuple[Transform, ...] = ()) -> Rule:
    """The rule for the leaves below a root."""
    source, target = (None if path is None else f"{root}/{path}" for path in (part.source, part.target))
    scale = () if factor == 1 else (Scale(factor),)
    return Rule(source, target, (*part.steps, *scale, *noise))


def restart(source: config.Model, target: config.Model, *, moments: bool = True) -> Surgery:
    """The same model with a fresh schedule: what any surgery is compared with."""
    require_same(source, target, "restart")
    if (source.pattern, source.hidden, source.moe) != (target.pattern, target.hidden, target.moe):
        raise ConfigError(
            "restart keeps the model: give both configs the same model.pattern, model.hidden and model.moe"
        )
    verdict = Verdict(True, "nothing changes")
    routing = [drop("routing/{kind:*}/last_fed"), fresh("routing/{kind:*}/last_fed")]
    return make("restart", [], routing, verdict, moments=moments)


def require_same(source: config.Model, target: config.Model, name: str) -> None:
    """Around the layers that change both models are one. Raises ConfigError."""
    for field in dataclasses.fields(config.Model):
        before, after = getattr(source, field.name), getattr(target, field.name)
        if field.name not in FREE and before != after:
            raise ConfigError(
                f"{name} leaves model.{field.name} as it is: {before} in the source, {after} in the target; set it to {before}"
            )
    if len(source.pattern) != len(target.pattern):
        raise ConfigError(
            f"{name} goes layer by layer: model.pattern has {len(source.pattern)} layers in the source and {len(target.pattern)} in the "
            f"target; write both with as many"
        )


def places(model: config.Model, channel: str) -> list[int]:
    """Layers of the pattern with this channel."""
    return [i for i, kind in enumerate(kinds.channels(model.pattern)) if kind == channel]
