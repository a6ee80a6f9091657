"""Array dimension names -> PartitionSpec. Beside mesh.py the only file that names mesh axes.

A parameter names its dimensions when it is made; activations name theirs where they are made or moved.
RULES says which mesh axes a dimension is spread over. Stacked parameters have more dimensions than names:
the extra leading ones (the scan over blocks) are not sharded.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

# Along a mesh axis of one device nothing differs and nothing is sent, so types do not name it. Else a sum over it would be a copy.
jax.config.update("jax_remove_size_one_mesh_axis_from_type", True)

BATCH_AXES = ("data", "fsdp", "expert")
STORAGE_AXIS = "fsdp"
LANES = 128
"""Columns of a tile in a TPU's memory."""

RULES: dict[str, tuple[str, ...]] = {
    # activations
    "batch": BATCH_AXES,
    "position": ("context",),
    "shard": (*BATCH_AXES, "context"),
    "heads": ("tensor",),
    "hidden": ("tensor",),
    "vocabulary": ("tensor",),
    # dense parameters: `storage` is the dimension that they and their moments are kept sharded on
    "storage": ("fsdp", "expert"),
    # expert parameters: fsdp on the middle dimension of each weight, never the last
    "expert": ("expert",),
    "expert_storage": ("fsdp",),
    "expert_hidden": ("tensor",),
    "expert_hidden_storage": ("tensor", "fsdp"),
    # the same where whole experts lie over `tensor` too, and positions with them
    "folded_expert": ("expert", "tensor"),
    "folded_position": ("context", "tensor"),
    "folded_shard": (*BATCH_AXES, "context", "tensor"),
}


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a sparse layer lies on the mesh: names of RULES for its arrays."""

    expert: str
    position: str
    """Of the tokens that a device routes and carries."""
    shard: str
    """Of statistics as they leave the layer, one part for each device that saw tokens."""
    hidden: str | None
    """Of the width of one expert; its outputs are then partial and summed."""
    hidden_storage: str


LAYOUTS: dict[str, Layout] = {
    "hidden": Layout("expert", "position", "shard", "expert_hidden", "expert_hidden_storage"),
    "experts": Layout("folded_expert", "folded_position", "folded_shard", None, "expert_storage"),
}
"""By what `tensor` cuts in the sparse layer: the width of each expert, or the set of experts."""

GATHERED: dict[str, str | None] = {"storage": None}
"""What a stored dimension becomes when a dense parameter is used."""


def spec(*names: str | None, ndim: int | None = None) -> P:
    """The PartitionSpec of dimensions with these names; None is not sharded. Two names on one axis raise ValueError."""
    owner: dict[str, str] = {}
    entries: list[tuple[str, ...] | None] = [None] * ((ndim or len(names)) - len(names))
    for name in names:
        if name is not None and name not in RULES:
            raise ValueError(f"dimension {name!r} of {names} is not in sharding.RULES: {', '.join(RULES)}")
        for axis in axes(name):
            if axis in owner:
                raise ValueError(f"dimensions {owner[axis]!r} and {name!r} of {names} both want mesh axis {axis!r}")
            owner[axis] = name or ""
        entries.append(axes(name) or None)
    return P(*entries)


def shards(mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh, name: str) -> int:
    """Number of parts a dimension is cut into."""
    size = 1
    for axis in RULES[name]:
        size *= mesh.shape[axis]
    return size


def several(name: str) -> tuple[str, ...]:
    """Mesh axes of a dimension that have more than one device of the mesh in use."""
    shape = jax.sharding.get_abstract_mesh().shape
    return tuple(axis for axis in RULES[name] if shape[axis] > 1)


def platform() -> str:
    """Platform of the devices of the mesh in use, `tpu` also where a topology is compiled for on another machine."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None or device.platform is None else device.platform


def device_kind() -> str:
    """Kind of the devices of the mesh in use, as JAX names it."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.devices()[0].device_kind if device is None else device.device_kind


def of_parameter(variable: Any, mesh: jax.sharding.Mesh) -> NamedSharding:
    """The sharding that an nnx.Param made with `dims=` is stored in."""
    return NamedSharding(mesh, spec(*variable.get_metadata("dims"), ndim=variable.get_value().ndim))


def gather(variable: Any, dtype: Any = None) -> jax.Array:
    """A dense parameter as operand of a product with activations: `joined` of its value, fp32 by default."""
    return joined(variable[...], variable.get_metadata("dims"), dtype)


def joined(stored: jax.Array, dims: tuple[str | None, ...], dtype: Any = None) -> jax.Array:
    """An array with dimensions of these names as operand of a product with activations: gathered from its storage shards in fp32, cast.

    Its gradient is summed in fp32, and each device keeps its piece. Axis by axis, the last first: of a gather over several axes at once the
    TPU compiler makes a sum of whole arrays, from 64 devices on. The type of the result is "reduced" over the axes that tokens lie over:
    devices there hold the same, and its gradient is still to be summed. A product with activations that have lost one of those axes raises
    ShardingTypeError: say again how they lie. What is added, multiplied or handed to a shard_map takes `whole`.
    """
    named = tuple(GATHERED.get(name, name) if name else None for name in dims)
    held, everywhere = several("storage") if "storage" in dims else (), several("shard")

    def body(piece: jax.Array) -> jax.Array:
        # First: the gradient's sum over these axes is then one of pieces.
        alike = tuple(axis for axis in everywhere if axis not in held)
        piece = jax.lax.pcast(piece, alike, to="reduced") if alike else piece
        for axis in reversed(held):
            piece = _joined_along(axis, piece, dims.index("storage"))
        return piece

    out = P(*spec(*named), reduced=frozenset(everywhere))
    found = jax.shard_map(body, in_specs=spec(*dims), out_specs=out)(stored)
    return found.astype(dtype or found.dtype)


def _joined_along(axis: str, piece: jax.Array, dim: int) -> jax.Array:
    """Pieces of every device along one mesh axis, joined in dimension `dim`, "reduced" along it."""
    if dim < piece.ndim - 1 or piece.shape[dim] % LANES == 0:
        return jax.lax.all_gather(piece, axis, axis=dim, tiled=True, to="reduced")
    # Pieces side by side in a tile are not scattered: of the gradient's sum the TPU compiler would make one of whole arrays.
    parts = jnp.moveaxis(jax.lax.all_gather(piece, axis, axis=0, to="reduced"), 0, -2)
    return parts.reshape(*piece.shape[:-1], -1)


def whole(variable: Any, dtype: Any = None) -> jax.Array:
    """A dense parameter that is added, multiplied or handed to a shard_map as alike on all devices: gathered in fp32, cast."""
    names = tuple(GATHERED.get(name, name) if name else None for name in variable.get_metadata("dims"))
    found = jax.reshard(variable[...], spec(*names))
    return found.astype(dtype or found.dtype)


def replicated(mesh: jax.sharding.Mesh) -> NamedSharding:
    return NamedSharding(mesh, P())


def batch_sharding(mesh: jax.sharding.Mesh, ndim: int = 2) -> NamedSharding:
    """Of an array [B] or [B, T, ...]: rows over all batch shards, `expert` innermost; positions over `context`."""
    return NamedSharding(mesh, spec("batch") if ndim == 1 else spec("batch", "position"))


def groups_sharding(mesh: jax.sharding.Mesh) -> NamedSharding:
    """Recorded routing [layers, groups, ...]: groups over all batch shards."""
    return NamedSharding(mesh, P(None, BATCH_AXES))


def of_experts(dims: tuple[str | None, ...]) -> bool:
    """Whether a parameter with these dimensions belongs to routed experts."""
    return any(layout.expert in dims for layout in LAYOUTS.values())


def axes(name: str | None) -> tuple[str, ...]:
    """Mesh axes of a dimension; none for None."""
    return () if name is None else RULES[name]
