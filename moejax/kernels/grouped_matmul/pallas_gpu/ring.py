"""The ring of shared-memory slots between the warpgroup that fetches and the two that multiply.

A turn is one step of a contraction, counted from the kernel's start; turn t is in slot t mod stages. The ring runs on across tiles,
so that the first steps of a tile are fetched while the last one is multiplied and stored.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from moejax.kernels.grouped_matmul.pallas_gpu.tiles import CONSUMERS

Count = jax.Array | int


class Ring(NamedTuple):
    """The barriers of a ring's slots."""

    loaded: Any
    """Barriers that a slot's transfers complete."""
    free: Any
    """Barriers at which both consumers say that they have read a slot."""

    @property
    def stages(self) -> int:
        return self.loaded.shape[0]

    def slot(self, turn: Count) -> jax.Array:
        return lax.rem(turn, jax.numpy.int32(self.stages))


def barriers(stages: int, transfers: int) -> Ring:
    """What a kernel allocates for a ring whose slots are filled by so many transfers."""
    return Ring(
        plgpu.Barrier(num_arrivals=transfers, num_barriers=stages),
        plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=stages),
    )


def loop(start: Count, stop: Count, body: Callable[[jax.Array], None]) -> None:
    """body(i) for i in [start, stop)."""

    def turn(i: jax.Array, _: tuple[()]) -> tuple[()]:
        body(i)
        return ()

    lax.fori_loop(start, stop, turn, ())


def fill(ring: Ring, first: Count, steps: Count, load: Callable[[jax.Array, jax.Array], None]) -> jax.Array:
    """The producer's side of `steps` turns from `first`: load(step, slot) as soon as the slot is free. Returns the turn after."""

    def step(k: jax.Array) -> None:
        slot = ring.slot(first + k)

        @pl.when(first + k >= ring.stages)
        def _() -> None:
            plgpu.barrier_wait(ring.free.at[slot])

        load(k, slot)

    loop(0, steps, step)
    return first + steps


def drain(ring: Ring, turns: Count) -> None:
    """The producer's end: the consumers have read all that was fetched."""
    loop(lax.max(turns - ring.stages, 0), turns, lambda turn: plgpu.barrier_wait(ring.free.at[ring.slot(turn)]))


def empty(
    ring: Ring, first: Count, steps: Count, multiply: Callable[[jax.Array, jax.Array], None], in_flight: int = 1
) -> None:
    """A consumer's side: multiply(step, slot) issues `in_flight` wgmmas, which are done when the next step's are issued.

    The last slot is still being read when this returns: read the accumulator, then `release`.
    """

    def step(k: jax.Array) -> None:
        slot = ring.slot(first + k)
        plgpu.barrier_wait(ring.loaded.at[slot])
        multiply(k, slot)
        plgpu.wgmma_wait(in_flight)

        @pl.when(k > 0)
        def _() -> None:
            plgpu.barrier_arrive(ring.free.at[ring.slot(first + k - 1)])

    loop(0, steps, step)


def release(ring: Ring, turn: Count) -> None:
    """Gives back the slot of the turn before `turn`, which no wgmma reads any more."""
    plgpu.barrier_arrive(ring.free.at[ring.slot(turn - 1)])
