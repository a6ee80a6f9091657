"""What introductions to sparse models print beside what the accounts say: a dense model against a sparse one, claim by claim.

Printed numbers are not kept here. Each is worked out by the rule that introductions use (2 FLOPs and 2 bytes a parameter, sizes as the
name says), so that the same table can be made of any two models; for 70B against 400B with 40B active it prints the usual figures.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

from moejax.errors import UserError
from moejax.plan import account as accounts
from moejax.plan import dense, serving
from moejax.plan.account import Account
from moejax.plan.columns import aligned
from moejax.plan.hardware import Chip
from moejax.plan.serving import Setting

CLOSE = 0.1
"""Of the computed number, by which a printed one may differ and be right: introductions round."""
USUAL = Setting(context=4096)
GIGA = 1e9


class Model(NamedTuple):
    """One side of the comparison."""

    name: str
    account: Account
    total: float | int
    """Parameters as its name says them."""
    active: float | int
    """Those of a token, said likewise."""


class Copies(NamedTuple):
    """A model whose name multiplies its experts by a size: 8x7B."""

    name: str
    account: Account
    experts: int
    each: float | int
    """Parameters."""


class Claim(NamedTuple):
    """A sentence that introductions print, with its number, and the number that comes out."""

    claim: str
    unit: str
    printed: float | int
    computed: float | int
    why: str

    @property
    def verdict(self) -> str:
        return "right" if abs(self.printed - self.computed) <= CLOSE * self.computed else "wrong"

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return self._asdict() | {"verdict": self.verdict}


class Comparison(NamedTuple):
    """Two models as introductions have them and as they are."""

    dense: Model
    sparse: Model
    chip: str
    setting: Setting
    chips: int
    """That both decode on where speeds are compared."""
    claims: tuple[Claim, ...]

    def to_dict(self) -> dict[str, Any]:
        """For JSON. Accounts have their own."""
        names = {"dense": self.dense.name, "sparse": self.sparse.name, "setting": self.setting._asdict()}
        return self._asdict() | names | {"claims": [claim.to_dict() for claim in self.claims]}


def model(name: str, account: Account, total: float | int | None = None, active: float | int | None = None) -> Model:
    """A side of the comparison, called by its sizes rounded to two digits unless they are given."""
    rounded = lambda number: float(f"{number:.1e}")  # noqa: E731
    return Model(
        name, account, total or rounded(account.total_parameters), active or rounded(account.active_parameters["A"])
    )


def compare(
    one: Model, other: Model, chip: Chip, setting: Setting = USUAL, copies: Iterable[Copies] = ()
) -> Comparison:
    """Every claim about a dense model and a sparse one.

    Args:
      one: dense.
      other: sparse.
      copies: further models whose names multiply, one claim each.

    Raises UserError where the first is not dense or the second not sparse, and for a setting that means nothing.
    """
    serving.check(setting)
    for side, wanted in ((one, False), (other, True)):
        if dense.is_sparse(side.account) != wanted:
            raise UserError(
                f"{side.name} {_nature(not wanted)} routed experts; give the dense model first and the sparse one second"
            )
    number = serving.chips(other.account, chip, setting, setting.batch)
    found = [
        *_flops(one, other, setting), *_memory(one, other, chip, setting), *_reading(other, setting),
        *_speed(one, other, chip, setting, number), *(_copies(each) for each in copies),
    ]  # fmt: skip
    return Comparison(one, other, chip.name, setting, number, tuple(found))


def _nature(sparse: bool) -> str:
    return "has" if sparse else "has no"


def _flops(one: Model, other: Model, setting: Setting) -> Iterable[Claim]:
    """Two FLOPs for each weight that a token meets."""
    own = [accounts.decoding_flops(side.account, setting.context) / GIGA for side in (one, other)]
    for side, flops in zip((one, other), own, strict=True):
        scores = flops - 2 * sum(part.multiplied for part in side.account.parts if part.decoding) / GIGA
        why = f"2 x {side.active / GIGA:g}B; attention's scores at position {setting.context:,} add {scores:.1f}, an embedding is looked up"
        yield Claim(f"{side.name}: FLOPs per token", "GFLOPs", 2 * side.active / GIGA, flops, why)
    why = "the ratio of active parameters, about: of arithmetic, not of speed or price"
    yield Claim(f"{other.name} needs so many times fewer FLOPs", "x", one.active / other.active, own[0] / own[1], why)


def _memory(one: Model, other: Model, chip: Chip, setting: Setting) -> Iterable[Claim]:
    """Two bytes for each parameter, over the memory of a chip."""
    weights = {side.name: accounts.weight_bytes(side.account, "bfloat16") / GIGA for side in (one, other)}
    for side in (one, other):
        yield Claim(
            f"{side.name}: weights in 16 bits", "GB", 2 * side.total / GIGA, weights[side.name], "all of them are held"
        )
    for side in (one, other):
        said = math.ceil(2 * side.total / (chip.memory * chip.per_chip))
        caches = setting.batch * accounts.cache_bytes(side.account, setting.context) / GIGA
        halves = setting._replace(precision="bfloat16")
        for batch, why in (
            (1, f"with {setting.margin:.0%} of memory left free"),
            (setting.batch, f"caches take {caches:,.0f} GB more"),
        ):
            needed = serving.chips(side.account, chip, halves, batch)
            yield Claim(f"{side.name}: {chip.name} chips to serve batch {batch}", "chips", said, needed, why)
    yield Claim(
        f"{other.name} needs memory for its active parameters", "GB", 2 * other.active / GIGA, weights[other.name],
        "the next token may choose any expert: all weights must be held",
    )  # fmt: skip


def _reading(other: Model, setting: Setting) -> Iterable[Claim]:
    """A step reads what a token meets, whatever the batch."""
    active, halves = 2 * other.active / GIGA, setting._replace(precision="bfloat16")
    for batch in (1, setting.batch):
        step = serving.read(other.account, halves, batch)
        share = step.experts / _routed_bytes(other.account)
        why = f"weights; {share:.0%} of the bytes of routed experts are read" + (
            "" if batch == 1 else ", as each token chooses others"
        )
        weights = (step.dense + step.experts) / GIGA
        yield Claim(f"{other.name} reads its active weights each step, batch {batch}", "GB", active, weights, why)
    yield Claim(
        f"{other.name} reads its active weights per token, batch {setting.batch}", "GB", active, weights / setting.batch,
        "once a step for all tokens of the batch, not once per token: total bytes / batch is nearer",
    )  # fmt: skip


def _routed_bytes(account: Account) -> float:
    """In 16 bits, of the routed experts that take part in decoding."""
    return 2.0 * sum(part.parameters for part in account.parts if part.decoding and part.active < part.parameters)


def _speed(one: Model, other: Model, chip: Chip, setting: Setting, number: int) -> Iterable[Claim]:
    """As many times faster as it has fewer active parameters, whatever the batch. Both on the same chips."""
    largest = serving.largest_batch(other.account, chip, number, setting)
    for batch in sorted({1, setting.batch, largest} - {0}):
        steps = [serving.decode(side.account, chip, number, setting, batch) for side in (one, other)]
        read = [sum(step.read) / GIGA for step in steps]
        why = f"a step reads {read[0]:,.0f} and {read[1]:,.0f} GB with caches; bound by {steps[0].bound} and {steps[1].bound}"
        title = f"{other.name} decodes so many times faster, batch {batch}"
        yield Claim(title, "x", one.active / other.active, steps[0].seconds / steps[1].seconds, why)
    own = [serving.chips(side.account, chip, setting, setting.batch) for side in (one, other)]
    steps = [
        serving.decode(side.account, chip, n, setting, setting.batch) for side, n in zip((one, other), own, strict=True)
    ]
    paid = [step.chips * step.seconds for step in steps]
    why = f"paid are chip-seconds, each on chips of its own, {own[0]} and {own[1]}; bound by {steps[0].bound} and {steps[1].bound}"
    title = f"{other.name} makes tokens so many times cheaper, batch {setting.batch}"
    yield Claim(title, "x", one.active / other.active, paid[0] / paid[1], why)


def _copies(named: Copies) -> Claim:
    total = named.account.total_parameters / GIGA
    why = f"{named.experts} copies of the feed-forward layers alone; attention and embeddings are shared"
    return Claim(f"{named.name}: parameters in all", "B", named.experts * named.each / GIGA, total, why)


def table(found: Comparison) -> str:
    """For people: printed, computed, verdict, and why."""
    one, other, setting = found.dense, found.sparse, found.setting
    cells = [["claim", "printed", "computed", "verdict"]]
    cells += [[c.claim, _shown(c.printed, c.unit), _shown(c.computed, c.unit), c.verdict] for c in found.claims]
    head, *lines = aligned(cells)
    sizes = (
        f"{m.name}: {m.account.total_parameters:,} parameters, {m.account.active_parameters['A']:,} active"
        for m in (one, other)
    )
    return "\n".join([
        *sizes,
        f"{found.chip}, {setting.context:,} positions in each cache; speeds in {setting.precision} on the {found.chips} chips that serve",
        f"  {setting.batch} sequences of {other.name}; right is within {CLOSE:.0%}",
        "", head,
        *(f"{line}\n    {claim.why}" for line, claim in zip(lines, found.claims, strict=True)),
        "", *serving.ASSUMED,
    ])  # fmt: skip


def _shown(number: float | int, unit: str) -> str:
    return (
        f"{number:,.0f} {unit}"
        if unit == "chips"
        else f"{number:,.3g} {unit}"
        if number < 100
        else f"{number:,.0f} {unit}"
    )
