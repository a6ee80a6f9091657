"""The shape legend, and the records that travel between the stages.

    B batch rows        T positions       N tokens (B*T)     D model width     V vocabulary
    E experts           K choices         A assignments      C slots per expert and group
    G groups            S tokens a group  F expert hidden    H heads           R rows of a buffer

A name may carry its dimensions as a suffix: `scores_GSE` is f32[G, S, E].
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

NOWHERE = np.iinfo(np.int32).max
"""The slot of an assignment that reaches no expert: its token is invalid or it lost its place."""

Stats = dict[str, Any]
"""Named sums over valid tokens. Sums add over rows, microbatches, devices and hosts."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """One global batch of rows: what is read, what is to be predicted, and what counts.

    `valid` marks the positions that exist for the model: a position is valid when its target lies in
    the same document. Everything else (padding, the last token of a document) takes no part anywhere.
    """

    tokens: Int[Array, "B T"]
    targets: Int[Array, "B T"]
    segments: Int[Array, "B T"]
    """Number of the document within the row, from 1; attention stays within equal segments. 0 is padding."""
    valid: Bool[Array, "B T"]
    labels: Int[Array, "B T"]
    """Kind of the document a token belongs to, for analysis; the model never reads it."""
    row_ids: Int[Array, " B"]
    """Index of the row within the global batch of the step: the root of the row's noise."""
    bytes: Int[Array, "B T"] | None = None
    """Of text that each target adds, for analysis; None where every token is a byte."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Assignment:
    """All of routing as one sparse token-by-expert matrix in coordinate form.

    `token` counts within its group; `slot` is the rank of the assignment within (group, expert), or
    `NOWHERE`. Only `gate` is differentiable.
    """

    token: Int[Array, "G A"]
    expert: Int[Array, "G A"]
    gate: Float[Array, "G A"]
    slot: Int[Array, "G A"]

    @property
    def kept(self) -> Bool[Array, "G A"]:
        """Assignments that reach an expert."""
        return self.slot != NOWHERE


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SoftAssignment:
    """Routing that is not sparse: what each slot takes of each token, and what each token takes of each slot."""

    dispatch: Float[Array, "G S E C"]
    combine: Float[Array, "G S E C"]


def count(mask: Bool[Array, "..."], axis: Any = None) -> Int[Array, "..."]:
    """Number of true entries as int32: exact where a float sum would stop at 2**24."""
    return jnp.sum(mask, axis=axis, dtype=jnp.int32)


def running_sum(x: Int[Array, "..."], axis: int) -> Int[Array, "..."]:
    """Inclusive sum along an axis in log2 steps. `jnp.cumsum` is quadratic in the window on CPU."""
    return jax.lax.associative_scan(jnp.add, x, axis=axis)


def no_gradient(tree: Any) -> Any:
    """Cotangents of what is frozen or only looked up: zeros, of type float0 for integers."""

    def of(a: Array) -> Array | np.ndarray:
        real = jnp.issubdtype(a.dtype, jnp.floating)
        return jnp.zeros_like(a) if real else np.zeros(a.shape, jax.dtypes.float0)

    return jax.tree.map(of, tree)
