"""Tile sizes measured on the accelerator at hand: from the static rule's, one size at a time, as long as it gets faster.

A candidate that does not compile, or that computes something else than the rule's tiles, is counted and left out. What is written is
the fastest of those measured in turn in the same run, with the rule's time beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from moejax.bench import calls, timing
from moejax.bench.shapes import Shape
from moejax.kernels import tuned
from moejax.kernels.chips import ChipSpec
from moejax.kernels.grouped_matmul import pallas_gpu, pallas_tpu

Candidate = TypeVar("Candidate", bound=Hashable)
WRONG = 0.01
"""Error in the norm of the rule's result from which on a candidate counts as wrong; rounding to bf16 makes 0.004."""
TURNS = 6
"""Steps away from the rule, at most."""
GAIN = 0.02
"""Share of the time that a step must save: less is noise."""


class Climb(NamedTuple):
    """Where a search ended."""

    best: Any
    seconds: float
    first: float
    """Of the tiles that it began with, in the round in which the best was found."""
    tried: int
    refused: int
    """Candidates that could not be had."""


def climb(
    start: Candidate,
    neighbours: Callable[[Candidate], list[Candidate]],
    measure: Callable[[list[Candidate]], dict[Candidate, float]],
) -> Climb:
    """The fastest neighbour's fastest neighbour, and so on, until none saves GAIN of the time.

    Args:
      measure: candidates -> seconds, all in turn in one run; one that cannot be had is left out. `start` must be had.
    """
    best, tried, refused, seen = start, 1, 0, {start}
    seconds = first = measure([start])[start]
    for _ in range(TURNS):
        new = [c for c in dict.fromkeys(neighbours(best)) if c not in seen]
        seen |= set(new)
        found = measure(list(dict.fromkeys([start, best, *new])))
        tried, refused = tried + len(new), refused + sum(c not in found for c in new)
        leader = min(found, key=lambda c: found[c])
        seconds, first = found[best], found[start]
        if found[leader] > (1 - GAIN) * found[best]:
            break
        best, seconds = leader, found[leader]
    return Climb(best, seconds, first, tried, refused)


def case(kernels: Any, shape: Shape, name: str, chip: ChipSpec, rounds: int, interpret: Any = False) -> dict[str, Any]:
    """The entry of tuned.json for one call of `calls.FUNCTIONS` by the module `pallas_tpu` or `pallas_gpu`, on random rows in groups
    drawn evenly; with `whose` call it is, and how many tiles were tried and refused."""
    sizes = np.random.default_rng(0).multinomial(shape.rows, np.full(shape.experts, 1 / shape.experts))
    given = calls.arguments(shape, name, _drawer()), jnp.asarray(sizes, jnp.int32), jnp.int32(0)

    def program(tiles: Any) -> Callable[[], Any]:
        function = calls.function(kernels, shape, name, chip, tiles=tiles, interpret=interpret)
        compiled = jax.jit(function).lower(*given).compile()
        return lambda: compiled(*given)

    with tuned.watched() as seen:
        wanted = program(None)()
    asked, rule = seen[0]
    programs = {rule: program(rule)}

    def measure(candidates: list[Any]) -> dict[Any, float]:
        for tiles in candidates:
            if tiles not in programs and (made := _tried(program, tiles, wanted)) is not None:
                programs[tiles] = made
        taken = timing.bursts({str(tiles): programs[tiles] for tiles in candidates if tiles in programs}, rounds)
        return {tiles: float(np.median(taken[str(tiles)])) for tiles in candidates if tiles in programs}

    found = climb(rule, kernels.neighbours, measure)
    measured = {"ms": round(1e3 * found.seconds, 4), "rule_ms": round(1e3 * found.first, 4)}
    return tuned.entry(asked, found.best, **measured, of=name, tried=found.tried, refused=found.refused)


def each(chip: ChipSpec, shapes: list[Shape], rounds: int) -> Iterator[dict[str, Any]]:
    """An entry for every call of these layers that the chip's kernels take."""
    kernels = {"tpu": pallas_tpu, "gpu": pallas_gpu}[chip.platform]
    for shape in shapes:
        for name in calls.FUNCTIONS[chip.platform]:
            if kernels.supports(*jax.tree.leaves(calls.arguments(shape, name, _shape))):
                yield case(kernels, shape, name, chip, rounds)


def line(entry: dict[str, Any]) -> str:
    """One entry for a person."""
    gain = entry["rule_ms"] / entry["ms"]
    what = f"{entry['of']:10} {entry['depth']:6} -> {entry['columns']:6} x {entry['rows_per_group']:5} rows"
    return f"{what} {entry['ms']:9.3f} ms, {gain:.2f}x the rule, {entry['refused']} of {entry['tried']} refused: {entry['tiles']}"


def _tried(program: Callable[[Any], Callable[[], Any]], tiles: Any, wanted: Any) -> Callable[[], Any] | None:
    """The program with these tiles; None where the compiler or the kernel refuses them, or the result is another."""
    try:
        made = program(tiles)
        error = timing.error_of(made(), wanted)
    except Exception as error:  # of many types, by compiler; the reason is said, and the entry counts it
        logging.warning("%s refused: %s", tiles, (str(error) or type(error).__name__).splitlines()[0][:200])
        return None
    if error < WRONG:
        return made
    logging.warning("%s is wrong by %.3g", tiles, error)
    return None


def _shape(*shape: int, dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def _drawer() -> Callable[..., Any]:
    """Makes an array of normal numbers, or of all eight-bit ones, another at each call."""
    keys = iter(jax.random.split(jax.random.key(0), 16))

    def draw(*shape: int, dtype: Any = jnp.bfloat16) -> jax.Array:
        if jnp.issubdtype(dtype, jnp.integer):
            return jax.random.randint(next(keys), shape, -127, 128, dtype)
        return jax.random.normal(next(keys), shape, dtype)

    return draw
