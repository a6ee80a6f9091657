"""What it takes to serve a model: chips that hold it, bytes that a generated token reads, and how fast it can be decoded at best.

A step of decoding makes one token of every sequence of a batch. Weights that all tokens share are read once a step, routed experts
when at least one token of the batch chose them, the caches of every sequence whole. `ASSUMED` says what is taken for granted.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from moejax.errors import UserError
from moejax.plan import account as accounts
from moejax.plan import dense
from moejax.plan.account import Account
from moejax.plan.columns import aligned
from moejax.plan.hardware import Chip

PRECISIONS = ("bfloat16", "int8", "int4")
ASSUMED = (
    "routing is uniform and tokens choose independently: b tokens that choose k of E experts meet E * (1 - (1 - k/E)^b) of them",
    "weights, caches and work lie evenly on all chips, which read at their peak and multiply at their bf16 peak meanwhile: weights in",
    "  fewer bits are widened as they are read. Sending between chips is not counted, prompts are not: all of it is a bound",
    "an embedding that is looked up is not read; every sequence has the whole context in its cache, latent attention reads it as it is",
)
"""Printed under each table."""


class Setting(NamedTuple):
    """What is served."""

    context: int = 8192
    """Positions in the cache of every sequence, the new token's own included."""
    precision: str = "bfloat16"
    """Of weights, a name in PRECISIONS or float32. Caches stay in the compute type."""
    batch: int = 128
    """Sequences that there must be room for."""
    margin: float = 0.1
    """Share of memory left for activations, the runtime and what does not divide evenly. Our assumption."""


USUAL = Setting()


class Read(NamedTuple):
    """Bytes that one step reads from memory, on all chips together."""

    dense: float
    """Of what every token meets: mixers, dense and shared layers, routers, the output projection."""
    experts: float
    """Of routed experts that a token of the batch chose."""
    caches: float
    """Of all sequences; recurrent state is also written."""


class Decode(NamedTuple):
    """One step of decoding on so many chips."""

    batch: int
    chips: int
    read: Read
    memory: float
    """Seconds to read that."""
    matrix: float
    """Seconds of the FLOPs."""

    @property
    def seconds(self) -> float:
        """A step takes at least this long."""
        return max(self.memory, self.matrix)

    @property
    def bound(self) -> str:
        return "HBM" if self.memory >= self.matrix else "FLOPs"

    @property
    def tokens_per_second(self) -> float:
        """Of all sequences, at most."""
        return self.batch / self.seconds

    @property
    def bytes_per_token(self) -> float:
        return sum(self.read) / self.batch


class Holding(NamedTuple):
    """Chips that hold the weights and the caches of a batch."""

    precision: str
    weights: int
    """Bytes."""
    one: int
    """Chips for one sequence."""
    batch: int
    """Chips for `Setting.batch` sequences."""


class Serving(NamedTuple):
    """A model on the fewest chips that serve a batch."""

    name: str
    chip: str
    setting: Setting
    holdings: tuple[Holding, ...]
    """In each of PRECISIONS."""
    chips: int
    """At the setting's precision and batch."""
    steps: tuple[Decode, ...]
    """On these chips, of one sequence, of the setting's batch, and of the largest batch that fits."""

    def to_dict(self) -> dict[str, Any]:
        """For JSON: bytes, seconds, tokens."""
        steps = [
            step._asdict() | {"read": step.read._asdict(), "seconds": step.seconds, "bound": step.bound}
            | {"tokens_per_second": step.tokens_per_second, "bytes_per_token": step.bytes_per_token}
            for step in self.steps
        ]  # fmt: skip
        holdings = [holding._asdict() for holding in self.holdings]
        return self._asdict() | {"setting": self.setting._asdict(), "holdings": holdings, "steps": steps}


def of_account(name: str, account: Account, chip: Chip, setting: Setting = USUAL) -> Serving:
    """The serving column of one model. Raises UserError for a setting that means nothing, and an unknown precision."""
    check(setting)
    held = tuple(_holding(account, chip, setting._replace(precision=precision)) for precision in PRECISIONS)
    number = chips(account, chip, setting, setting.batch)
    batches = sorted({1, setting.batch, largest_batch(account, chip, number, setting)})
    steps = tuple(decode(account, chip, number, setting, batch) for batch in batches)
    return Serving(name, chip.name, setting, held, number, steps)


def with_twins(name: str, account: Account, chip: Chip, setting: Setting = USUAL) -> list[Serving]:
    """A model beside the dense ones of equal total and of equal active parameters (`plan.dense`); a dense model alone."""
    every = {name: account}
    if dense.is_sparse(account):
        every |= {"dense, equal total": dense.equal_total(account), "dense, equal active": dense.equal_active(account)}
    return [of_account(title, counted, chip, setting) for title, counted in every.items()]


def distinct(number: float | int, chosen: float | int, batch: int) -> float | int:
    """Expected number of different experts of `number` that a batch meets, each token choosing `chosen` of them uniformly; with what a
    token meets of their parameters, expected parameters."""
    return number * (1 - (1 - chosen / number) ** batch)


def read(account: Account, setting: Setting, batch: int) -> Read:
    """Bytes that a step for so many sequences reads."""
    found = {"dense": 0.0, "experts": 0.0}
    for part in account.parts:
        if not part.decoding or part.name == "embedding":
            continue
        if part.name == "unembedding":  # a tied one has no parameters of its own, and is read all the same
            part = part._replace(parameters=part.multiplied, active=part.multiplied)
        whole = accounts.weight_bytes(dataclasses.replace(account, parts=(part,)), setting.precision)
        if part.active < part.parameters:
            found["experts"] += whole * distinct(part.parameters, part.active, batch) / part.parameters
        else:
            found["dense"] += whole
    written = sum(m.layers * m.fixed for m in account.mixings if m.decoding)
    return Read(**found, caches=float(batch * (accounts.cache_bytes(account, setting.context) + written)))


def decode(account: Account, chip: Chip, number: int, setting: Setting, batch: int) -> Decode:
    """A step for `batch` sequences on so many chips, whether or not they fit there."""
    one = read(account, setting, batch)
    memory = sum(one) / (number * chip.per_chip * chip.bandwidth)
    flops = batch * accounts.decoding_flops(account, setting.context)
    return Decode(batch, number, one, memory, flops / (number * chip.per_chip * chip.flops))


def chips(account: Account, chip: Chip, setting: Setting, batch: int) -> int:
    """Fewest that hold the weights and the caches of so many sequences and leave the margin free. Slices come in certain sizes."""
    held = accounts.weight_bytes(account, setting.precision) + batch * accounts.cache_bytes(account, setting.context)
    return math.ceil(held / room(chip, setting))


def largest_batch(account: Account, chip: Chip, number: int, setting: Setting) -> int:
    """Sequences whose caches fit beside the weights on so many chips; 0 where the weights leave no room for one."""
    left = number * room(chip, setting) - accounts.weight_bytes(account, setting.precision)
    return max(int(left // accounts.cache_bytes(account, setting.context)), 0)


def room(chip: Chip, setting: Setting) -> float:
    """Bytes of a chip, of all its JAX devices together, for weights and caches."""
    return chip.usable * chip.per_chip * (1 - setting.margin)


def check(setting: Setting) -> None:
    """Raises UserError for numbers out of range."""
    for name in ("context", "batch"):
        if getattr(setting, name) < 1:
            raise UserError(f"{name}={getattr(setting, name)}: a whole number, at least 1")
    if not 0 <= setting.margin < 1:
        raise UserError(f"margin={setting.margin}: a share of a chip's memory, at least 0 and less than 1; set 0.1")


def _holding(account: Account, chip: Chip, setting: Setting) -> Holding:
    weights = accounts.weight_bytes(account, setting.precision)
    of = (chips(account, chip, setting, batch) for batch in (1, setting.batch))
    return Holding(setting.precision, weights, *of)


def table(rows: Sequence[Serving]) -> str:
    """For people: memory, then speed. All rows are of one chip and setting."""
    chip, setting = rows[0].chip, rows[0].setting
    first = [["", *(f"{h.precision} GB  chips" for h in rows[0].holdings)]]
    for row in rows:
        first.append([row.name, *(f"{h.weights / 1e9:,.1f}  {h.one:>5} {h.batch:>5}" for h in row.holdings)])
    head = "batch  chips  GB/step  GB/token  experts GB  HBM ms  FLOPs ms  bound  tokens/s  a sequence  a chip"
    second = [["", *head.split("  ")], *(_cells(row.name, step) for row in rows for step in row.steps)]
    lines = [
        f"weights, and {chip} chips that hold them with caches of {setting.context:,} positions for 1 and for {setting.batch} sequences,"
        f" {setting.margin:.0%} of memory left free",
        *aligned(first), "",
        f"decoding in {setting.precision} on the chips for {setting.batch} sequences, at most; the last line of each is the largest batch",
        *aligned(second), "",
        *ASSUMED,
    ]  # fmt: skip
    return "\n".join(lines)


def _cells(name: str, step: Decode) -> list[str]:
    speed = step.tokens_per_second
    return [
        name, f"{step.batch:,}", f"{step.chips}", f"{sum(step.read) / 1e9:,.1f}", f"{step.bytes_per_token / 1e9:,.2f}",
        f"{step.read.experts / 1e9:,.1f}", f"{1e3 * step.memory:,.2f}", f"{1e3 * step.matrix:,.2f}", step.bound, f"{speed:,.0f}",
        f"{1 / step.seconds:,.1f}", f"{speed / step.chips:,.0f}",
    ]  # fmt: skip
