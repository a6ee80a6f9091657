"""Sparse to sparse: experts copied, left out, averaged or numbered anew. One table says what every new expert is made of.

`table[layer][new expert]` lists old experts: one for a copy, several for their mean. Router columns, optimiser moments and the
balancers' state go the same way.
"""

from __future__ import annotations

from collections.abc import Sequence

from moejax import config
from moejax.checkpoint import gates
from moejax.checkpoint.entries import Mean, Select
from moejax.checkpoint.gates import Verdict
from moejax.checkpoint.rules import Rule, drop, fresh
from moejax.checkpoint.surgery import Part, Surgery, make, places, require_same
from moejax.checkpoint.transforms import Transform
from moejax.errors import ConfigError
from moejax.moe import balancers, routers, widths
from moejax.moe.records import columns

Table = tuple[tuple[tuple[int, ...], ...], ...]
"""[layers][experts] -> the old experts that one is made of. One row serves all layers."""
Rows = Sequence[Sequence[int]]
"""[layers][experts] -> an old expert; one row serves all layers."""


def grow(source: config.Model, target: config.Model, *, moments: bool = True) -> Surgery:
    """E experts to m E: copy j of expert e becomes expert m e + j, with its router column.

    Preserves the function where a token chooses all copies of what it chose, or with one choice one of them; the down projections are
    multiplied by what makes the gates of the chosen copies add up.
    """
    old, new = source.moe, target.moe
    if new.num_experts % old.num_experts:
        raise ConfigError(
            f"grow copies every expert equally often: model.moe.num_experts={new.num_experts} is no multiple of {old.num_experts}; set "
            f"{2 * old.num_experts}"
        )
    times = new.num_experts // old.num_experts
    table = (tuple((e // times,) for e in range(new.num_experts)),)
    factor = gates.growth_factor(old, new)
    return _regrouped("grow", source, target, table, gates.of_growth(old, new), factor, moments)


def permute(source: config.Model, target: config.Model, order: Rows, *, moments: bool = True) -> Surgery:
    """New expert e is old expert order[layer][e]. Preserves the function unless the router goes by numbers or groups."""
    if any(sorted(row) != list(range(source.moe.num_experts)) for row in order):
        raise ConfigError(
            f"permute wants every expert of 0 to {source.moe.num_experts - 1} once in each row of its order"
        )
    verdict = gates.of_order(source.moe, target.moe)
    return _regrouped("permute", source, target, _single(order), verdict, 1.0, moments)


def prune(source: config.Model, target: config.Model, kept: Rows, *, moments: bool = True) -> Surgery:
    """New expert e is old expert kept[layer][e]; the others are left out. Does not preserve the function."""
    if any(len(set(row)) != len(row) for row in kept):
        raise ConfigError("prune keeps an expert once; name each once in a row")
    verdict = Verdict(False, "what the experts that are left out did is lost")
    return _regrouped("prune", source, target, _single(kept), verdict, 1.0, moments)


def merge(source: config.Model, target: config.Model, groups: Table, *, moments: bool = True) -> Surgery:
    """New expert e is the mean of the old experts groups[layer][e], its router column the mean of theirs. Does not preserve the
    function, unless the experts of a group are equal."""
    if any(sorted(e for group in row for e in group) != list(range(source.moe.num_experts)) for row in groups):
        raise ConfigError(f"merge wants every expert of 0 to {source.moe.num_experts - 1} in one group of each row")
    verdict = Verdict(False, "the mean of different experts is not what any of them did")
    return _regrouped("merge", source, target, groups, verdict, 1.0, moments)


def neighbours(old: int, new: int) -> Table:
    """Groups of consecutive experts of equal size, for `merge`."""
    if old % new:
        raise ConfigError(f"{old} experts cannot be merged into {new} equal groups; choose a divisor of {old}")
    return (tuple(tuple(range(e * old // new, (e + 1) * old // new)) for e in range(new)),)


def busiest(load: Rows, number: int) -> list[list[int]]:
    """Of every layer the experts with the largest load, in order of their numbers; ties to the lower one. For `prune`."""
    return [sorted(sorted(range(len(row)), key=lambda e, row=row: (-row[e], e))[:number]) for row in load]


# ---- the rules ----------------------------------------------------------------------------------------------------


def _single(rows: Rows) -> Table:
    return tuple(tuple((int(e),) for e in row) for row in rows)


def _regrouped(
    name: str, source: config.Model, target: config.Model, table: Table, verdict: Verdict, factor: float, moments: bool
) -> Surgery:
    require_same(source, target, name)
    layers = places(source, "sparse")
    _check(name, source, target, table)
    parts = []
    for j, i in enumerate(layers):
        rows = table[j :: len(layers)] if len(table) > 1 else table
        channel = f"blocks/layers/{i}/channel"
        weights, down = (
            f"{channel}/experts/0/{{weight:gate|up|gate_bias|up_bias}}",
            f"{channel}/experts/0/{{weight:down|down_bias}}",
        )
        head = f"{channel}/router/{{head:*}}"
        parts += [
            Part(weights, weights, (_along(rows, 1),)),
            Part(down, down, (_along(rows, 1),), factor),
            Part(head, head, (_along(_columns(rows, source.moe), 2),)),
        ]
    return make(name, parts, _routing(source.moe, target.moe, table), verdict, moments=moments)


def _along(rows: Table, axis: int) -> Transform:
    """The table as a transform: copies bit for bit, or means."""
    if all(len(group) == 1 for row in rows for group in row):
        return Select(tuple(tuple(group[0] for group in row) for row in rows), axis)
    return Mean(rows, axis)


def _columns(rows: Table, moe: config.MoE) -> Table:
    """Of the router's columns: an expert's slots move together, zero-computation experts come after them as they were."""
    slots = moe.soft_slots
    zero = tuple((e,) for e in range(moe.num_experts, columns(moe)))
    return tuple((*(tuple(e * slots + s for e in group) for group in row for s in range(slots)), *zero) for row in rows)


def _states(moe: config.MoE) -> dict[str, bool]:
    """Names of a layer's routing state, and whether each has an entry for every column."""
    keeper = routers.ROUTERS[moe.router].keeper
    values = balancers.init(moe) | ({} if keeper is None else keeper.init(moe))
    return {name: value.shape == (columns(moe),) for name, value in values.items()}


def _routing(old: config.MoE, new: config.MoE, table: Table) -> list[Rule]:
    """Biases and thresholds go with their experts; what one model lacks is dropped or fresh, and nothing was fed yet."""
    before, after, root = _states(old), _states(new), "routing/sparse"
    moved = _along(_columns(table, old), 1)
    rules = [drop(f"{root}/last_fed"), fresh(f"{root}/last_fed")]
    rules += [Rule(f"{root}/{n}", f"{root}/{n}", (moved,) if before[n] else ()) for n in before if n in after]
    rules += [drop(f"{root}/{n}") for n in before if n not in after]
    return rules + [fresh(f"{root}/{n}") for n in after if n not in before]


def _check(name: str, source: config.Model, target: config.Model, table: Table) -> None:
    """Sparse layers where they were, experts of one width, a table of the right size."""
    old, new = source.moe, target.moe
    layers = places(source, "sparse")
    if not layers or layers != places(target, "sparse"):
        raise ConfigError(
            f"{name} changes experts: model.pattern is {source.pattern} in the source and {target.pattern} in the target; have the same "
            f"sparse layers in both"
        )
    if len(widths.of_classes(old)) > 1 or len(widths.of_classes(new)) > 1:
        raise ConfigError(f"{name} wants experts of one width; set model.moe.hidden_classes=()")
    if old.zero_experts != new.zero_experts or old.soft_slots != new.soft_slots:
        raise ConfigError(
            f"{name} leaves model.moe.zero_experts={old.zero_experts} and soft_slots={old.soft_slots} as they are; set both so"
        )
    number = len(layers) * source.repeats
    if len(table) not in (1, number) or any(len(row) != new.num_experts for row in table):
        raise ConfigError(
            f"{name}: {len(table)} row(s) of {sorted({len(row) for row in table})} experts, but the target has {number} sparse layers of "
            f"{new.num_experts}; give one row for all layers, or one for each, and set model.moe.num_experts to its length"
        )
    used = [e for row in table for group in row for e in group]
    if not all(0 <= e < old.num_experts for e in used):
        raise ConfigError(f"{name}: expert {max(used)} is not one of the source's 0 to {old.num_experts - 1}")
