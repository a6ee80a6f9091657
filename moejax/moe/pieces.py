"""Groups whose positions lie on several devices: routed whole on each of them, carried in pieces.

A group is rows or windows of the config, never what a device happens to hold. So logits are gathered along positions, every device
decides the whole group, and takes of the decision what concerns its own tokens.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moejax import collectives, config
from moejax.arrays import NOWHERE, Assignment, SoftAssignment, running_sum
from moejax.collectives import Axes


@dataclasses.dataclass(frozen=True)
class Pieces:
    """How the positions of rows are cut; static."""

    axes: Axes
    """Mesh axes that positions lie along."""
    positions: int
    """T of a whole row."""

    @property
    def number(self) -> int:
        return collectives.devices(self.axes)


def whole(x: Array, pieces: Pieces) -> Array:
    """[B, t, ...] of a device's own positions -> [B, T, ...]."""
    return collectives.all_gather(x, pieces.axes, axis=1)


def own(x: Array, pieces: Pieces, axis: int = 1) -> Array:
    """This device's piece of a dimension that lies in the order of positions."""
    if pieces.number == 1:
        return x
    size = x.shape[axis] // pieces.number
    return jax.lax.dynamic_slice_in_dim(x, collectives.place(pieces.axes) * size, size, axis)


def same(x: Array, pieces: Pieces) -> Array:
    """What every device of a group found alike, known to be so."""
    number = x.astype(jnp.int32) if x.dtype == bool else x
    return collectives.alike(number, pieces.axes).astype(x.dtype)


def of_assignment(placed: Any, pieces: Pieces, moe: config.MoE, by_token: bool) -> Any:
    """What of an Assignment, or of any tree of arrays [G, A], concerns this device's tokens.

    Windows lie on one device, so a device takes its windows. Of longer groups it takes its tokens: a slice where
    assignments lie `by_token`, else all of them, those of other devices' tokens without a slot.
    """
    if pieces.number == 1:
        return placed
    if moe.group_window is not None:
        return jax.tree.map(lambda x: _windows(x, pieces, moe.group_window), placed)
    if isinstance(placed, SoftAssignment) or not isinstance(placed, Assignment):
        return jax.tree.map(lambda x: own(x, pieces), placed)
    size = moe.group_rows * pieces.positions // pieces.number
    mine = jax.tree.map(lambda x: own(x, pieces), placed) if by_token else placed
    token = mine.token - size * collectives.place(pieces.axes)
    here = (token >= 0) & (token < size)
    return dataclasses.replace(mine, token=jnp.where(here, token, 0), slot=jnp.where(here, mine.slot, NOWHERE))


def _windows(x: Array, pieces: Pieces, window: int) -> Array:
    rows = x.reshape(-1, pieces.positions // window, *x.shape[1:])
    return own(rows, pieces).reshape(-1, *x.shape[1:])


def ranked(assignment: Assignment, experts: int) -> Assignment:
    """Slots without gaps: of a piece of a group the kept ones, counted anew in each expert in the order they lie in."""
    taken = (jax.nn.one_hot(assignment.expert, experts, dtype=bool) & assignment.kept[..., None]).astype(jnp.int32)
    before = running_sum(taken, axis=1) - taken
    last = jnp.minimum(assignment.expert, experts - 1)
    rank = jnp.take_along_axis(before, last[..., None], axis=-1)[..., 0]
    return dataclasses.replace(assignment, slot=jnp.where(assignment.kept, rank, NOWHERE))


def joined(buffers: Float[Array, "E G C D"], axes: Axes) -> Float[Array, "E G c D"]:
    """Every device's tokens of a group in its buffers -> an equal piece of the full buffers on each; C is padded to equal pieces."""
    number = collectives.devices(axes)
    padding = -buffers.shape[2] % number
    padded = jnp.pad(buffers, ((0, 0), (0, 0), (0, padding), (0, 0))) if padding else buffers
    # Three dimensions: of four, the compiler for TPU sums the whole buffers on every device and cuts afterwards.
    flat = padded.reshape(-1, *padded.shape[2:])
    return collectives.psum_scatter(flat, axes, axis=1).reshape(*buffers.shape[:2], -1, buffers.shape[3])


def parted(buffers: Float[Array, "E G c D"], axes: Axes, slots: int) -> Float[Array, "E G C D"]:
    """The way back: the full buffers of C slots on every device."""
    flat = buffers.reshape(-1, *buffers.shape[2:])
    full = collectives.all_gather(flat, axes, axis=1)
    return full.reshape(*buffers.shape[:2], -1, buffers.shape[3])[:, :, :slots]
