"""What a CPU uses: batched where the largest group is near the mean, else the loop over blocks; decided by the sizes as they come."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array

from moejax.kernels.activations import Activation
from moejax.kernels.grouped_matmul import Groups
from moejax.kernels.grouped_mlp import batched, blocked
from moejax.kernels.grouped_mlp.composed import Kept, Slopes
from moejax.kernels.grouped_mlp.weights import Weights

STEPS = (1.125, 1.5)
"""Sizes of a padded group, in mean loads. Past the last, the loop does less work."""
WORTH = 1 << 26
"""Multiplications of a layer below which a second and third program are not worth compiling."""


def capacities(rows: int, groups: int, weights: Weights) -> tuple[int, ...]:
    """Static sizes that groups are padded to, smallest first; none for a layer that is small."""
    _, width, hidden = weights.up.shape
    if rows * width * hidden < WORTH:
        return ()
    return tuple(-(-int(step * rows) // (8 * groups)) * 8 for step in STEPS)


def forward(
    x: Array, index: Array, groups: Groups, weights: Weights, row_weight: Array | None, activation: Activation
) -> tuple[Array, Kept]:
    """y [R, D] and what the backward pass keeps, in a layout that the sizes choose."""
    rows, number = index.shape[0], groups.sizes.shape[0]
    sizes = capacities(rows, number, weights)
    room = max([blocked.rows_needed(rows, number), *(number * size for size in sizes)])
    ways: list[Callable] = [functools.partial(batched.forward, room=room, capacity=size) for size in sizes]
    ways.append(functools.partial(blocked.forward, room=room))
    run = [lambda *operands, way=way: way(*operands, activation) for way in ways]
    return jax.lax.switch(_which(groups, sizes), run, x, index, groups, weights, row_weight)


def backward(
    x: Array,
    index: Array,
    groups: Groups,
    weights: Weights,
    row_weight: Array | None,
    kept: Kept,
    activation: Activation,
    dy: Array,
) -> Slopes:
    """All gradients for the cotangent dy [R, D] of y."""
    sizes = capacities(index.shape[0], groups.sizes.shape[0], weights)
    ways: list[Callable] = [functools.partial(batched.backward, capacity=size) for size in sizes] + [blocked.backward]
    run = [lambda *operands, way=way: way(*operands[:-1], activation, operands[-1]) for way in ways]
    return jax.lax.switch(_which(groups, sizes), run, x, index, groups, weights, row_weight, kept, dy)


def _which(groups: Groups, sizes: tuple[int, ...]) -> Array:
    """Which of the ways holds the largest group."""
    return jnp.sum(jnp.max(groups.sizes) > jnp.asarray(sizes, jnp.int32), dtype=jnp.int32)
