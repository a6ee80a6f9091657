"""Chips and how they are wired: what a plan must know of a machine that is not there. Figures are of one JAX device.

Sources: GOOGLE, cloud.google.com/tpu/docs/{v4, v5e, v5p, v6e, tpu7x}, system architecture; BOOK, "How to Scale Your Model" (Austin et
al. 2025, jax-ml.github.io/scaling-book), part 2, the tables of reference numbers; NVIDIA, data sheets of H100 SXM, H200 SXM and DGX.
"""

from __future__ import annotations

import dataclasses
import math
import re

from moejax.errors import ConfigError
from moejax.kernels import chips

GiB = 2**30
CUBE = 4
"""Chips along each side of the block that optical switches join: slices of whole blocks wrap (GOOGLE, v4: 3D mesh and 3D torus)."""
RING = 16
"""Chips along a dimension of a two-dimensional slice that wraps: a side of the whole pod (BOOK, part 2)."""


@dataclasses.dataclass(frozen=True)
class Chip:
    """One kind of JAX device and the links of the chip that it is, or is a part of."""

    name: str
    memory: int
    """Bytes of main memory, nominal."""
    room: int | None
    """Bytes that the compiler leaves to a program; None where it was not asked."""
    flops: float
    """Peak in bf16, FLOP/s."""
    int8_flops: float
    """Peak in int8, operations/s."""
    bandwidth: float
    """Of main memory, bytes/s."""
    torus: int
    """Dimensions of the torus that chips are wired in; 0 for a switch that joins all of a host's devices."""
    link: float
    """Bytes/s that one device sends in one direction over one link of its chip, or into the switch."""
    network: float
    """Bytes/s of one device to other slices, or hosts, over the network of the data centre."""
    cores: int
    """Of a chip: TensorCores."""
    per_chip: int
    """JAX devices of a chip. They share its links and lie beside each other in one more, innermost dimension."""
    shapes: tuple[str, ...]
    """Slices that are offered, in chips."""
    inside: float = 0.0
    """Bytes/s one way between devices of a chip."""
    configuration: str = ""
    """What the compiler must be told so that a device is what it is on a machine; empty for nothing."""
    split: bool = False
    """Whether jax.make_mesh cuts a dimension of the torus over two mesh axes (jax 0.10 to 0.12, source of make_mesh)."""

    @property
    def usable(self) -> int:
        """Bytes that a program may take: what the compiler leaves, or all where it was not asked."""
        return self.room or self.memory


def _chip(name: str, **facts: object) -> Chip:
    """A chip whose speeds kernels know already."""
    spec = chips.CHIPS[name]
    return Chip(name, flops=spec.flops, bandwidth=spec.bandwidth, **facts)  # pyright: ignore[reportArgumentType]


PLANE = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
"""GOOGLE, v5e and v6e, supported configurations."""
SPACE = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16", "16x16x16")
"""GOOGLE, v4 and v5p: the most common slices; other multiples of four exist."""

CHIPS: dict[str, Chip] = {
    chip.name: chip
    for chip in (
        # GOOGLE: 275e12 in bf16 and int8, 32 GiB, 1200 GB/s. BOOK: link 4.5e10, network 6.25e9. Both cores are one
        # device where the compiler is told so. Room: the compiler of jax 0.10.2, "exceeds available HBM (30.75G)".
        Chip("v4", 32 * GiB, int(30.75 * GiB), 275e12, 275e12, 1200e9, 3, 4.5e10, 6.25e9, 2, 1, (*SPACE[:-1], "12x16x16"),
             configuration="megacore"),
        # GOOGLE: 16 GB, int8 393e12, 6.4 Tbit/s of network for 256 chips; 400 GB/s of links are 5e10 one way, of which BOOK gives 4.5e10.
        # Room: the compiler of jax 0.10.2, "exceeds available HBM (15.75G)".
        _chip("v5e", memory=16 * GiB, room=int(15.75 * GiB), int8_flops=393e12, torus=2, link=4.5e10, network=3.125e9, cores=1, per_chip=1,
              shapes=PLANE, split=True),
        # GOOGLE: 50 Gbit/s of network, 1200 GB/s of links, which are 1e11 one way, of which BOOK gives 9e10. BOOK: 96 GB (GOOGLE: 95 GiB),
        # int8 918e12. Room: the same message, 95.74G.
        _chip("v5p", memory=96 * GiB, room=int(95.74 * GiB), int8_flops=918e12, torus=3, link=9e10, network=6.25e9, cores=2, per_chip=1,
              shapes=(*SPACE, "16x16x24")),
        # GOOGLE: 32 GB, int8 1836e12, 25.6 Tbit/s of network for 256 chips; 800 GB/s of links, of which BOOK gives 9e10 one way.
        # Room: the same message, 31.25G.
        _chip("v6e", memory=32 * GiB, room=int(31.25 * GiB), int8_flops=1836e12, torus=2, link=9e10, network=12.5e9, cores=1, per_chip=1,
              shapes=PLANE),
        # Half a chip. GOOGLE: 192 GiB, 1200 GB/s of links, 100 Gbit/s of network a chip. BOOK: int8 4.61e15 and 9e10 one way a chip.
        # Between the two, six times one link (GOOGLE). The largest slice is the pod of 9,216. Room: the same message, 94.75G a device.
        _chip("tpu7x", memory=96 * GiB, room=int(94.75 * GiB), int8_flops=2305e12, torus=3, link=4.5e10, network=6.25e9, cores=2,
              per_chip=2, inside=5.4e11, shapes=(*SPACE, "16x16x36")),
        # NVIDIA: 80 GB, int8 1979e12 without sparsity, NVLink 900 GB/s both ways together, one 400 Gbit/s adapter a device.
        _chip("h100", memory=80 * GiB, room=None, int8_flops=1979e12, torus=0, link=450e9, network=50e9, cores=132, per_chip=1,
              shapes=("1", "2", "4", "8")),
        # NVIDIA: 141 GB, the rest as H100.
        _chip("h200", memory=141 * GiB, room=None, int8_flops=1979e12, torus=0, link=450e9, network=50e9, cores=132, per_chip=1,
              shapes=("1", "2", "4", "8")),
    )
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Topology:
    """A slice: chips in a torus, or devices at a switch."""

    chip: Chip
    dims: tuple[int, ...]
    """Chips along each dimension of the torus."""

    @property
    def name(self) -> str:
        return f"{self.chip.name}:{'x'.join(str(n) for n in self.dims)}"

    @property
    def chips(self) -> int:
        return math.prod(self.dims)

    @property
    def devices(self) -> int:
        """JAX devices of the slice."""
        return self.chips * self.chip.per_chip

    @property
    def grid(self) -> tuple[int, ...]:
        """Devices along each dimension: those of the torus, and where a chip has several devices one more for them."""
        return self.dims if self.chip.per_chip == 1 else (*self.dims, self.chip.per_chip)

    def wraps(self, dim: int) -> bool:
        """Whether the last device along a dimension has a link to the first, so that data goes round both ways.

        In three dimensions those of slices of whole cubes do (GOOGLE, v4), in two those as long as the pod (BOOK)."""
        if self.chip.torus == 2:
            return self.dims[dim] == RING
        return self.chip.torus == 3 and dim < len(self.dims) and all(n % CUBE == 0 for n in self.dims)


def parse_topology(text: str) -> Topology:
    """`v5p:8x8x16`, in chips of one slice; of a GPU `h200:8`, devices of one host.

    Raises ConfigError for another form, an unknown chip, another number of dimensions or more chips than the largest slice."""
    found = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", text)
    if found is None:
        raise ConfigError(
            f"--topology={text}: give a chip and the chips of one slice along each dimension of its torus, as in v5p:8x8x16, v6e:16x16 or "
            f"h200:8; chips: {', '.join(CHIPS)}"
        )
    name, dims = found[1], tuple(int(n) for n in found[2].split("x"))
    own = chip(name)
    wanted, offered = max(own.torus, 1), ", ".join(own.shapes)
    if len(dims) != wanted or min(dims) < 1:
        raise ConfigError(f"--topology={text}: a slice of {name} has {wanted} dimension(s); choose one of {offered}")
    most = max(math.prod(int(n) for n in shape.split("x")) for shape in own.shapes)
    if math.prod(dims) > most:
        raise ConfigError(
            f"--topology={text} has {math.prod(dims)} chips, more than the {most} of the largest slice of {name}; choose one of {offered}, "
            f"and several slices with --slices"
        )
    return Topology(own, dims)


def topologies(name: str) -> list[Topology]:
    """Slices of a chip that are offered, small ones first. Raises ConfigError for an unknown chip."""
    return [parse_topology(f"{name}:{shape}") for shape in chip(name).shapes]


def chip(name: str) -> Chip:
    """Of a name in CHIPS. Raises ConfigError for another."""
    if name not in CHIPS:
        raise ConfigError(f"{name} is not a known chip; choose one of {', '.join(CHIPS)}")
    return CHIPS[name]
