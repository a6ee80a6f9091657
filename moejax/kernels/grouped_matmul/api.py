"""One signature for the grouped matmul and its weight gradient, and the table of backends."""

from __future__ import annotations

import functools
import importlib

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moejax import collectives, sharding
from moejax.arrays import no_gradient
from moejax.errors import ConfigError
from moejax.kernels.grouped_matmul.backend import Backend, Groups, group_of_row, owned
from moejax.kernels.quantized import Quantized

BACKENDS: dict[str, str] = {
    "reference": "reference",
    "blocked": "blocked",
    "xla": "xla",
    "pallas_tpu": "pallas_tpu.backend",
    "pallas_gpu": "pallas_gpu.backend",
}
"""Module of each backend, loaded when it is first asked for: not every installation of JAX has every compiler."""

BY_PLATFORM = {"cpu": "blocked"}
"""What `auto` means where measurements say so; elsewhere it is `xla`."""


@functools.cache
def backend(name: str) -> Backend:
    """The functions of a name in BACKENDS."""
    return importlib.import_module(f"moejax.kernels.grouped_matmul.{BACKENDS[name]}").BACKEND


def pick(impl: str, platform: str | None = None) -> str:
    """The backend's name for `impl`, with `auto` resolved for the platform."""
    if impl == "auto":
        return BY_PLATFORM.get(platform or sharding.platform(), "xla")
    if impl not in BACKENDS:
        raise ConfigError(f"model.moe.kernel={impl!r} is not a backend; choose auto or one of {', '.join(BACKENDS)}")
    return impl


def grouped_matmul(
    x: Float[Array, "M K"],
    w: Float[Array, "G _ _"] | Quantized,
    group_sizes: Int[Array, " H"],
    *,
    transpose_w: bool = False,
    bias: Float[Array, "G N"] | None = None,
    group_offset: Int[Array, ""] | int | None = None,
    out_dtype: jnp.dtype | None = None,
    impl: str = "auto",
) -> Float[Array, "M N"]:
    """Rows of x, contiguous by group, each times the weight of its group.

    Args:
      x: [M, K]. Group g owns the group_sizes[g] rows after those of the groups before it.
      w: [G, K, N], or [G, N, K] with `transpose_w`; int8 with scales is frozen.
      group_sizes: int32, sum at most M. A group may be empty; its weight gradient is then exactly zero.
      bias: [G, N], added to every row of its group.
      group_offset: the group of which w holds the weight first, where group_sizes has more groups than w.
      out_dtype: of the result; x's if None.
      impl: a name in BACKENDS, or auto.

    Returns:
      [M, N], accumulated in fp32. Rows of no group, or of groups that w does not hold, are unspecified: select, never multiply.
    """
    groups = groups_of(group_sizes, group_offset, w.shape[0])
    arrays = collectives.vary_together(x, w, bias, groups)
    return _matmul(*arrays, transpose_w, jnp.dtype(out_dtype or x.dtype), pick(impl))


def grouped_matmul_dw(
    x: Float[Array, "M K"],
    dy: Float[Array, "M N"],
    group_sizes: Int[Array, " H"],
    *,
    groups: int | None = None,
    group_offset: Int[Array, ""] | int | None = None,
    accumulate_into: Float[Array, "G K N"] | None = None,
    out_dtype: jnp.dtype | None = None,
    impl: str = "auto",
) -> Float[Array, "G K N"]:
    """The weight gradient: of every group, the sum over its rows of x^T dy, in fp32; exactly zero for an empty group.

    `groups` and `group_offset` choose a part of the groups; `accumulate_into` is added to the result."""
    mine = groups_of(group_sizes, group_offset, groups or group_sizes.shape[0])
    dtype = jnp.dtype(out_dtype or (x if accumulate_into is None else accumulate_into).dtype)
    x, dy, mine, into = collectives.vary_together(x, dy, mine, accumulate_into)
    return backend(pick(impl)).weight_gradient(x, dy, mine, dtype, into)


def groups_of(group_sizes: Int[Array, " H"], offset: Int[Array, ""] | int | None, number: int) -> Groups:
    """`number` groups from group `offset` on, and the row they begin at."""
    if offset is None:
        if number != group_sizes.shape[0]:
            raise ValueError(
                f"{group_sizes.shape[0]} group sizes for {number} weights: give group_offset, the first group that is held"
            )
        return Groups(group_sizes)
    before = jnp.where(jnp.arange(group_sizes.shape[0], dtype=jnp.int32) < offset, group_sizes, 0)
    sizes = jax.lax.dynamic_slice_in_dim(group_sizes, offset, number)
    return Groups(sizes, jnp.sum(before, dtype=jnp.int32))


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _matmul(
    x: Array,
    w: Array | Quantized,
    bias: Array | None,
    groups: Groups,
    transpose_w: bool,
    out_dtype: jnp.dtype,
    impl: str,
) -> Array:
    return backend(impl).matmul((x,), (w,), groups, transpose_w, bias, out_dtype)


def _forward(x, w, bias, groups, transpose_w, out_dtype, impl):
    return _matmul(x, w, bias, groups, transpose_w, out_dtype, impl), (x, w, bias, groups)


def _backward(transpose_w: bool, out_dtype: jnp.dtype, impl: str, kept: tuple, dy: Array):
    x, w, bias, groups = kept
    own, dy = backend(impl), dy.astype(x.dtype)
    dx = own.matmul((dy,), (w,), groups, not transpose_w, None, x.dtype)
    dx = jnp.where(owned(groups, x.shape[0]), dx, jnp.zeros((), dx.dtype))
    if isinstance(w, Quantized):
        dw = no_gradient(w)
    else:
        first, second = (dy, x) if transpose_w else (x, dy)
        dw = own.weight_gradient(first, second, groups, w.dtype)
    d_bias = None if bias is None else sum_of_groups(dy, groups, bias.dtype)
    return dx, dw, d_bias, no_gradient(groups)


_matmul.defvjp(_forward, _backward)


def sum_of_groups(rows: Float[Array, "M N"], groups: Groups, dtype: jnp.dtype) -> Float[Array, "G N"]:
    """The sum of every group's rows, in fp32."""
    mine = group_of_row(groups, rows.shape[0])[:, None] == jnp.arange(groups.sizes.shape[0], dtype=jnp.int32)[None, :]
    live = jnp.where(owned(groups, rows.shape[0]), rows, jnp.zeros((), rows.dtype))
    return jnp.einsum("mg,mn->gn", mine.astype(rows.dtype), live, preferred_element_type=jnp.float32).astype(dtype)
