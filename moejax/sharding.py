"""Array dimension names -> PartitionSpec. Beside mesh.py the only file that names mesh axes.

A parameter names its dimensions when it is made; activations name theirs where they are made or moved.
RULES says which mesh axes a dimension is spread over. Stacked parameters have more dimensions than names:
the extra leading ones (the scan over blocks) are not sharded.
"""

from __future__ import annotations

from typing import Any

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from moejax import compat

BATCH_AXES = ("data", "fsdp", "expert")
EXPERT_AXIS = "expert"
STORAGE_AXIS = "fsdp"

RULES: dict[str, tuple[str, ...]] = {
    # activations
    "batch": BATCH_AXES,
    "shard": BATCH_AXES,
    "position": (),
    # dense parameters: `storage` is the dimension that they and their moments are kept sharded on
    "storage": ("fsdp", "expert"),
    "heads": (),
    "hidden": (),
    # expert parameters: fsdp on the middle dimension of each weight, never the last
    "expert": ("expert",),
    "expert_storage": ("fsdp",),
    "expert_hidden": (),
    "expert_hidden_storage": ("fsdp",),
}
"""`position` is to go over `context`, and heads and hidden widths over `tensor`; mesh.check refuses those axes until then."""

GATHERED: dict[str, str | None] = {"storage": None}
"""What a stored dimension becomes when a dense parameter is used."""


def spec(*names: str | None, ndim: int | None = None) -> P:
    """The PartitionSpec of dimensions with these names; None is not sharded. Two names on one axis raise ValueError."""
    owner: dict[str, str] = {}
    entries: list[tuple[str, ...] | None] = [None] * ((ndim or len(names)) - len(names))
    for name in names:
        if name is not None and name not in RULES:
            raise ValueError(f"dimension {name!r} of {names} is not in sharding.RULES: {', '.join(RULES)}")
        axes = RULES[name] if name is not None else ()
        for axis in axes:
            if axis in owner:
                raise ValueError(f"dimensions {owner[axis]!r} and {name!r} of {names} both want mesh axis {axis!r}")
            owner[axis] = name or ""
        entries.append(axes or None)
    return P(*entries)


def shards(mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh, name: str) -> int:
    """Number of parts a dimension is cut into."""
    size = 1
    for axis in RULES[name]:
        size *= mesh.shape[axis]
    return size


def batch_shards() -> int:
    """Number of parts a batch is cut into on the mesh in use."""
    return shards(jax.sharding.get_abstract_mesh(), "batch")


def platform() -> str:
    """Platform of the devices of the mesh in use, `tpu` also where a topology is compiled for on another machine."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None or device.platform is None else device.platform


def of_parameter(variable: Any, mesh: jax.sharding.Mesh) -> NamedSharding:
    """The sharding that an nnx.Param made with `dims=` is stored in."""
    return NamedSharding(mesh, spec(*variable.get_metadata("dims"), ndim=variable.get_value().ndim))


def gather(variable: Any, dtype: Any = None) -> jax.Array:
    """A dense parameter ready for use: gathered from its storage shards in fp32, so that its gradient is reduced in fp32, then cast."""
    names = tuple(GATHERED.get(name, name) if name else None for name in variable.get_metadata("dims"))
    whole = jax.reshard(variable[...], spec(*names))
    return whole.astype(dtype or whole.dtype)


def replicated(mesh: jax.sharding.Mesh) -> NamedSharding:
    return NamedSharding(mesh, P())


def batch_sharding(mesh: jax.sharding.Mesh) -> NamedSharding:
    """Rows over all batch shards, `expert` innermost; trailing dimensions whole."""
    return NamedSharding(mesh, P(BATCH_AXES))


def groups_sharding(mesh: jax.sharding.Mesh) -> NamedSharding:
    """Recorded routing [layers, groups, ...]: groups over all batch shards."""
    return NamedSharding(mesh, P(None, BATCH_AXES))


def vary(x: jax.Array) -> jax.Array:
    """Inside shard_map: x as a value that may differ along every batch axis, so that its gradient is summed over them."""
    missing = tuple(axis for axis in BATCH_AXES if axis not in compat.varying_axes(x))
    return jax.lax.pcast(x, missing, to="varying") if missing else x


def all_gather(x: jax.Array, mesh_axis: str, axis: int) -> jax.Array:
    """Inside shard_map: the pieces of x of every device of a mesh axis, joined. Among one device the identity."""
    return x if jax.lax.axis_size(mesh_axis) == 1 else jax.lax.all_gather(x, mesh_axis, axis=axis, tiled=True)


def psum_scatter(x: jax.Array, mesh_axis: str) -> jax.Array:
    """Inside shard_map: the sum of x over a mesh axis, each device keeping its piece of the leading dimension."""
    return (
        x if jax.lax.axis_size(mesh_axis) == 1 else jax.lax.psum_scatter(x, mesh_axis, scatter_dimension=0, tiled=True)
    )


def everywhere_max(x: jax.Array) -> jax.Array:
    """Inside shard_map: the largest x of all devices, on all of them."""
    return jax.lax.pmax(x, BATCH_AXES)


def all_to_all(x: jax.Array, mesh_axis: str, split: int, concat: int) -> jax.Array:
    """Inside shard_map: pieces of dimension `split` go to the devices of a mesh axis, what arrives is joined along `concat`."""
    return x if jax.lax.axis_size(mesh_axis) == 1 else jax.lax.all_to_all(x, mesh_axis, split, concat, tiled=True)
