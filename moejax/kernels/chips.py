"""What a kernel needs to know of the chip it is compiled for. It is passed in: no kernel asks the machine what it is."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class ChipSpec:
    """One JAX device."""

    name: str
    platform: str
    """tpu or gpu."""
    cores: int
    """TensorCores that one device drives (two where they are fused into one device), or streaming multiprocessors."""
    matrix_unit: int
    """Side of the matrix unit; rows and columns of its natural tile."""
    memory: int
    """Bytes of a core's own memory: VMEM, or shared memory of a multiprocessor."""
    flops: float
    """Peak of the device in bf16, FLOP/s."""
    bandwidth: float
    """Of its main memory, bytes/s."""


MiB = 2**20

CHIPS: dict[str, ChipSpec] = {
    chip.name: chip
    for chip in (
        ChipSpec("v5e", "tpu", 1, 128, 128 * MiB, 197e12, 819e9),
        ChipSpec("v5p", "tpu", 2, 128, 64 * MiB, 459e12, 2765e9),
        ChipSpec("v6e", "tpu", 1, 256, 128 * MiB, 918e12, 1640e9),
        ChipSpec("tpu7x", "tpu", 1, 256, 64 * MiB, 1153e12, 3690e9),
        ChipSpec("h100", "gpu", 132, 64, 227 * 1024, 989e12, 3350e9),
        ChipSpec("h200", "gpu", 132, 64, 227 * 1024, 989e12, 4800e9),
    )
}
"""TPU figures are of a JAX device: the chip of v5e, v5p and v6e, one of the two cores of tpu7x."""

KINDS = {
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
    "TPU7x": "tpu7x",
    "NVIDIA H100": "h100",
    "NVIDIA H200": "h200",
}
"""`device_kind` as JAX reports it, up to a suffix such as ` 80GB HBM3`."""


def of(kind: str) -> ChipSpec | None:
    """The chip with this device kind; None for one that nothing is known of."""
    known = [name for name in KINDS if kind == name or kind.startswith((f"{name} ", f"{name}-"))]
    return CHIPS[KINDS[max(known, key=len)]] if known else None
