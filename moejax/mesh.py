"""Devices -> a Mesh whose axes are all Explicit. One device is the mesh of ones, not a special case."""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils

from moejax import config
from moejax.errors import ConfigError

AXES = ("data", "fsdp", "expert", "tensor", "context")
ACROSS = AXES[0]
"""The one axis that may lie across slices; every other lies within one."""


def shape(mesh: config.Mesh) -> tuple[int, ...]:
    """Devices along each of AXES."""
    return tuple(getattr(mesh, axis) for axis in AXES)


def several(mesh: config.Mesh) -> dict[str, int]:
    """Sizes of the axes that have more than one device."""
    return {axis: size for axis, size in zip(AXES, shape(mesh), strict=True) if size > 1}


def check(mesh: config.Mesh) -> None:
    """The rules that need no device."""
    for axis, size in zip(AXES, shape(mesh), strict=True):
        if size < 1:
            raise ConfigError(f"mesh.{axis}={size}: an axis has at least one device; set it to 1")


def make(mesh: config.Mesh, devices: Sequence[jax.Device] | None = None) -> jax.sharding.Mesh:
    """The mesh over all devices, or over those given; of several slices, each holds consecutive parts of `data`. Raises ConfigError
    when the sizes do not fit the devices."""
    devices = jax.devices() if devices is None else devices
    wanted = math.prod(shape(mesh))
    if wanted != len(devices):
        sizes = " * ".join(f"{axis}={size}" for axis, size in several(mesh).items()) or "1"
        raise ConfigError(
            f"mesh {sizes} = {wanted} devices, but there are {len(devices)}; the product must be {len(devices)}, "
            f"for example --config.mesh.fsdp={len(devices)} with every other axis 1"
        )
    explicit = (jax.sharding.AxisType.Explicit,) * len(AXES)
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices == 1:
        return jax.make_mesh(shape(mesh), AXES, devices=devices, axis_types=explicit)
    if mesh.data % slices:
        raise ConfigError(
            f"mesh.data={mesh.data} on {slices} slices: every other axis lies within a slice, data over the slow links between "
            f"them; choose a multiple of {slices}"
        )
    inside, across = (mesh.data // slices, *shape(mesh)[1:]), (slices, *(1 for _ in AXES[1:]))
    grid = mesh_utils.create_hybrid_device_mesh(inside, across, devices=devices, allow_split_physical_axes=True)
    return jax.sharding.Mesh(grid, AXES, axis_types=explicit)


def describe(mesh: jax.sharding.Mesh) -> str:
    """`fsdp=2 expert=4`, or `one device`."""
    sizes = [f"{axis}={size}" for axis, size in mesh.shape.items() if size > 1]
    kinds = sorted({d.device_kind for d in np.asarray(mesh.devices).flat})
    return f"{' '.join(sizes) or 'one device'} ({', '.join(kinds)})"
