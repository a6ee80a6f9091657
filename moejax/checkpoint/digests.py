"""A digest of every array that does not depend on the mesh: a flipped bit is found on whatever mesh the array is restored."""

from __future__ import annotations

import contextlib
import hashlib
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, UInt32

from moejax import collectives, sharding

SALTS = (0x9E3779B1, 0x85EBCA77)
"""Of the two halves of a digest."""
PIECE = 2**20
"""Numbers that are mixed at a time, unless one row alone has more."""
LARGEST = 8
"""Bytes of a number that can be digested."""


def of(flat: dict[str, Any]) -> dict[str, str]:
    """Path -> sixteen hexadecimal digits, for a flat dict of jax arrays. All hosts get all of them."""
    names = sorted(flat)
    meshes = {x.sharding.mesh for x in flat.values() if isinstance(x.sharding, jax.NamedSharding)}
    with contextlib.ExitStack() as stack:
        for mesh in meshes:
            stack.enter_context(jax.set_mesh(mesh))
        values = np.asarray(_digests(tuple(flat[name] for name in names)))
    return {name: f"{high:08x}{low:08x}" for name, (high, low) in zip(names, values.tolist(), strict=True)}


def differing(flat: dict[str, Any], wanted: dict[str, str]) -> list[str]:
    """Names whose array is not the one that the digest was made of, or that only one side has."""
    found = of(flat)
    return sorted(name for name in {*found, *wanted} if found.get(name) != wanted.get(name))


@jax.jit
def _digests(arrays: tuple[Array, ...]) -> UInt32[Array, "n 2"]:
    return jnp.stack([_digest(x) for x in arrays]) if arrays else jnp.zeros((0, 2), jnp.uint32)


def _digest(x: Array) -> UInt32[Array, " 2"]:
    """Each bit pattern is mixed with its index in the whole array; sums mod 2^32 have no order."""
    spec = jax.typeof(x).sharding.spec
    axes = tuple(name for entry in spec for name in _names(entry))
    shape = x.shape

    def place(of: tuple[int, ...], dims: range) -> Array:
        """Of every entry of these dimensions of a part, what they add to its index in the whole array."""
        found = jnp.zeros((), jnp.uint32)
        for d in dims:
            names = _names(spec[d])
            first = collectives.place(names) * of[d]
            index = (jnp.arange(of[d], dtype=jnp.int32) + first).astype(jnp.uint32)
            stride = math.prod(shape[d + 1 :]) % 2**32
            found = found[..., None] + (index * jnp.uint32(stride)).reshape((1,) * found.ndim + (of[d],))
        return found

    def local(part: Array) -> Array:
        number, rows, inner = _cut(part.shape)
        outer, rest = place(part.shape, range(inner)), place(part.shape, range(inner, part.ndim))

        def piece(given: tuple[Array, Array]) -> Array:
            numbers, begin = given
            return mixed(bits(numbers), begin.reshape(rows, *(1,) * rest.ndim) + rest[None])

        pieces = part.reshape(number, rows, *part.shape[inner:]), outer.reshape(number, rows)
        total = jnp.sum(jax.lax.map(piece, pieces), axis=0, dtype=jnp.uint32)
        return collectives.total(total, axes)

    if not axes:
        return local(x)
    return jax.shard_map(local, in_specs=spec, out_specs=sharding.spec())(x)


def _cut(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """How an array is taken in pieces: their number, the rows of each, and the first dimension of a row. What is mixed is four bytes for
    each number several times over, which of a whole state at once is more memory than there is."""
    inner = next((d for d in range(len(shape)) if math.prod(shape[d:]) <= PIECE), max(len(shape) - 1, 0))
    lines, most = math.prod(shape[:inner]), max(PIECE // max(math.prod(shape[inner:]), 1), 1)
    rows = max(n for n in range(1, min(lines, most) + 1) if lines % n == 0)
    return lines // rows, rows, inner


def mixed(patterns: UInt32[Array, "*dims"], place: UInt32[Array, "*dims"]) -> UInt32[Array, " 2"]:
    """The sums of two hashes of (pattern, place), each a multiply and shift mix of 32 bits."""

    def half(salt: int) -> Array:
        v = (patterns + jnp.uint32(1)) * jnp.uint32(salt) ^ (place + jnp.uint32(salt)) * jnp.uint32(0xC2B2AE3D)
        for shift, factor in ((15, 0x2C1B3C6D), (12, 0x297A2D39)):
            v = (v ^ v >> jnp.uint32(shift)) * jnp.uint32(factor)
        return jnp.sum(v ^ v >> jnp.uint32(15), dtype=jnp.uint32)

    return jnp.stack([half(salt) for salt in SALTS])


def bits(x: Array) -> Array:
    """The bit pattern of each number as u32; of eight bytes both halves, one folded into the other."""
    if x.dtype == jnp.bool_:
        return x.astype(jnp.uint32)
    size = x.dtype.itemsize
    whole = jax.lax.bitcast_convert_type(x, {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}.get(size, jnp.uint32))
    if size < LARGEST:
        return whole.astype(jnp.uint32)
    return whole[..., 0] ^ whole[..., 1] * jnp.uint32(SALTS[0])


def _names(entry: Any) -> tuple[str, ...]:
    """Mesh axes of one entry of a spec."""
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


def of_parts(flat: dict[str, Any]) -> dict[tuple[str, str], list[str]]:
    """(path, part of the array) -> hashes of its copies on the devices of this process, each brought to the host. Copies of a part must
    be alike."""
    found: dict[tuple[str, str], list[str]] = {}
    for name, x in sorted(flat.items()):
        for shard in x.addressable_shards:
            own = hashlib.blake2b(np.asarray(shard.data).tobytes(), digest_size=8).hexdigest()
            found.setdefault((name, str(shard.index)), []).append(own)
    return found
