"""What a body of shard_map says to other devices. Mesh axes come as tuples of names; the empty tuple is one device.

Along axes of one device nothing is said: the types of arrays do not name them (sharding.py).
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from moejax import compat

Axes = tuple[str, ...]


def devices(axes: Axes) -> int:
    """Devices along these mesh axes together."""
    return math.prod(jax.lax.axis_size(axis) for axis in axes)


def several(axes: Axes) -> Axes:
    """Those of these mesh axes that have more than one device."""
    return tuple(axis for axis in axes if jax.lax.axis_size(axis) > 1)


def place(axes: Axes) -> Array:
    """This device's index along these mesh axes together, i32."""
    return jax.lax.axis_index(several(axes)) if several(axes) else jnp.zeros((), jnp.int32)


def vary(x: Array, axes: Axes) -> Array:
    """x as a value that may differ along these mesh axes, so that its gradient is summed over them."""
    missing = tuple(axis for axis in several(axes) if axis not in compat.varying_axes(x))
    return jax.lax.pcast(x, missing, to="varying") if missing else x


def vary_like(x: Array, other: Array) -> Array:
    """x as a value that may differ wherever `other` may."""
    return vary(x, tuple(sorted(compat.varying_axes(other))))


def vary_together(*trees: Any) -> tuple[Any, ...]:
    """Trees of arrays as values that may differ along every mesh axis that any of them may differ along."""
    axes = tuple(sorted({axis for x in jax.tree.leaves(trees) for axis in compat.varying_axes(x)}))
    return jax.tree.map(lambda x: vary(x, axes), trees)


def alike(x: Array, axes: Axes) -> Array:
    """An array that is equal along these mesh axes, known to be so."""
    return jax.lax.pmax(x, several(axes)) if several(axes) else x


def once(x: Array, axes: Axes) -> Array:
    """x on the first device along these mesh axes, zero on the others: counted once where all of them have it."""
    return jnp.where(place(axes) == 0, x, jnp.zeros_like(x)) if several(axes) else x


def total(x: Array, axes: Axes) -> Array:
    """The sum of x along these mesh axes, on all of their devices."""
    return jax.lax.psum(x, several(axes)) if several(axes) else x


def all_gather(x: Array, axes: Axes, axis: int) -> Array:
    """The pieces of x of every device along these mesh axes, joined."""
    return jax.lax.all_gather(x, several(axes), axis=axis, tiled=True) if several(axes) else x


def psum_scatter(x: Array, axes: Axes, axis: int = 0) -> Array:
    """The sum of x along these mesh axes, each device keeping its piece of dimension `axis`."""
    return jax.lax.psum_scatter(x, several(axes), scatter_dimension=axis, tiled=True) if several(axes) else x


def everywhere_max(x: Array) -> Array:
    """The largest x of all devices, on all of them."""
    varying = tuple(sorted(compat.varying_axes(x)))
    return jax.lax.pmax(x, varying) if varying else x


def all_to_all(x: Array, axes: Axes, split: int, concat: int) -> Array:
    """Pieces of dimension `split` go to the devices along these mesh axes, what arrives is joined along `concat`."""
    return jax.lax.all_to_all(x, several(axes), split, concat, tiled=True) if several(axes) else x
