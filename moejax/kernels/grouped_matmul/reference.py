"""The truth: every row against every group's weight, the wrong ones masked, in fp32. G times the ideal FLOPs."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from moejax.kernels import quantized
from moejax.kernels.grouped_matmul.backend import Backend, Groups, added, group_of_row, rows_of_groups

HIGHEST = jax.lax.Precision.HIGHEST


def _masked(x: Array, groups: Groups) -> Array:
    """[M, G, K]: each row at its own group, zero elsewhere."""
    mine: Bool[Array, "M G"] = group_of_row(groups, x.shape[0])[:, None] == jnp.arange(groups.sizes.shape[0])[None, :]
    return jnp.where(mine[:, :, None], x[:, None, :], jnp.zeros((), x.dtype))


def _matmul(xs: tuple, ws: tuple, groups: Groups, transpose_w: bool, bias: Array | None, out_dtype: jnp.dtype) -> Array:
    what = "mgk,gnk->mn" if transpose_w else "mgk,gkn->mn"
    parts = [
        jnp.einsum(
            what, _masked(x, groups), quantized.whole(w, x.dtype), precision=HIGHEST, preferred_element_type=jnp.float32
        )
        for x, w in zip(xs, ws, strict=True)
    ]
    y = sum(parts[1:], parts[0])
    y = y if bias is None else y + rows_of_groups(bias, groups, y.shape[0])
    return y.astype(out_dtype)


def _weight_gradient(x: Array, dy: Array, groups: Groups, out_dtype: jnp.dtype, into: Array | None = None) -> Array:
    # Both are masked: a row that no group owns may hold NaN.
    mine = jnp.where(group_of_row(groups, x.shape[0])[:, None] < groups.sizes.shape[0], dy, jnp.zeros((), dy.dtype))
    dw = jnp.einsum("mgk,mn->gkn", _masked(x, groups), mine, precision=HIGHEST, preferred_element_type=jnp.float32)
    return added(dw, into, out_dtype)


BACKEND = Backend(_matmul, _weight_gradient)
