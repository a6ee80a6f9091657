"""What a million generated tokens cost on one's own chips, and from which load on that is less than buying them.

Prices are the user's, in one currency. Chips are paid for whether they are busy or not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from moejax.errors import UserError
from moejax.plan.columns import aligned
from moejax.plan.serving import Serving

HOUR, DAY, MILLION = 3600, 86400, 1e6


class BreakEven(NamedTuple):
    """The load at which chips cost what the same tokens cost elsewhere."""

    tokens_per_second: float
    utilization: float
    """Of what the chips generate at their largest batch; above 1 they are dearer at any load."""

    @property
    def tokens_per_day(self) -> float:
        return DAY * self.tokens_per_second


class Costs(NamedTuple):
    """Of one model on its chips."""

    name: str
    chips: int
    chip_price: float | int
    """Of one chip for an hour."""
    reached: float | int
    """Share of the decode bound that a server is taken to reach."""
    per_million: dict[int, float]
    """Price of a million tokens by batch, chips busy all the time."""
    api_price: float | int | None
    """Of a million tokens elsewhere."""
    break_even: BreakEven | None

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        even = self.break_even and self.break_even._asdict() | {"tokens_per_day": self.break_even.tokens_per_day}
        return self._asdict() | {"break_even": even}


def of_serving(
    row: Serving, chip_price: float | int, api_price: float | int | None = None, reached: float | int = 1.0
) -> Costs:
    """Costs of a model on its chips.

    Args:
      chip_price: of one chip for an hour.
      api_price: of a million generated tokens elsewhere, None where there is nothing to compare with.
      reached: share of the decode bound, at most 1.

    Raises UserError for prices that are not positive and a share out of range.
    """
    _positive("chip_price", chip_price, "the price of one chip for an hour")
    if not 0 < reached <= 1:
        raise UserError(
            f"reached={reached}: the share of the decode bound that a server reaches, above 0 and at most 1"
        )
    second = row.chips * chip_price / HOUR
    per_million = {step.batch: MILLION * second / (reached * step.tokens_per_second) for step in row.steps}
    even = None
    if api_price is not None:
        _positive("api_price", api_price, "the price of a million tokens elsewhere")
        load = MILLION * second / api_price
        even = BreakEven(load, load / (reached * row.steps[-1].tokens_per_second))
    return Costs(row.name, row.chips, chip_price, reached, per_million, api_price, even)


def _positive(name: str, price: float | int, meaning: str) -> None:
    if not (price > 0 and math.isfinite(price)):
        raise UserError(f"--{name}={price}: {meaning}, above 0; leave it out where there is none")


def table(rows: Sequence[Costs]) -> str:
    """For people. All rows are of the same prices."""
    first = rows[0]
    cells = [["", "chips", "batch", "a million tokens"]]
    for row in rows:
        cells += [[row.name, str(row.chips), f"{batch:,}", f"{price:,.2f}"] for batch, price in row.per_million.items()]
    lines = [
        f"cost of generated tokens at {first.chip_price:g} a chip-hour, chips always busy at {first.reached:.0%} of the decode bound",
        *aligned(cells),
    ]
    if first.api_price is not None:
        lines += ["", f"against {first.api_price:g} a million tokens elsewhere"]
        lines += [f"{row.name}: {_said(row.break_even)}" for row in rows if row.break_even]
    return "\n".join(lines)


def _said(even: BreakEven) -> str:
    load = f"{even.tokens_per_second:,.0f} tokens/s ({even.tokens_per_day / MILLION:,.0f} million a day)"
    if even.utilization > 1:
        return f"never cheaper: the price of its chips buys {load}, {even.utilization:.1f} times what they can generate"
    return f"cheaper above {load}, {even.utilization:.0%} of what its chips can generate"
