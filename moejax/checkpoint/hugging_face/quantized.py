"""Quantised tensors of published checkpoints, read as the tensors they stand for.

NAME_blocks u8[E, N, M/32, 16], NAME_scales u8[E, N, M/32]    ->  NAME [E, M, N]: MXFP4 (OCP Microscaling Formats v1.0), two numbers of
                                                                4 bits in a byte, the low half first, times 2^(scale - 127)
NAME f8_e4m3[N, M], NAME_scale_inv f32[N/b, M/c]              ->  NAME [N, M]: each block of b x c times its scale; the last may be smaller
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from moejax.checkpoint.hugging_face.files import TYPES, Stored
from moejax.errors import DamagedError, UserError

MXFP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
"""Sign, two bits of exponent, one of mantissa."""
FACTOR = np.append(np.ldexp(np.float32(1), np.arange(255) - 127), np.float32(np.nan))
"""By scale; 255 is no number."""
BLOCK = 32
"""Numbers that share a scale in MXFP4."""
FLOATS = tuple(TYPES[name] for name in ("BF16", "F16", "F32"))
METHODS = ("fp8", "mxfp4")


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor as the rules see it: stored so, or made of what is stored."""

    shape: tuple[int, ...]
    parts: Mapping[str, Stored]
    """The stored tensors it is made of, by name."""
    how: str = ""
    """How it is made of them; empty where it is stored."""
    blocks: tuple[int, int] = (0, 0)
    """Of float8: rows and columns of a block."""

    @property
    def rowwise(self) -> bool:
        """Whether it is large, as of all experts, and a few rows cost as much less than all."""
        return self.how != "fp8" and len(self.shape) > 2

    def array(self, rows: slice = slice(None)) -> np.ndarray:
        """Entries of dimension 0: a view where they are stored, float32 where they are made, of what those rows need alone."""
        first, *rest = (part.array() for part in self.parts.values())
        if self.how == "mxfp4":
            return of_mxfp4(first[rows], rest[0][rows])
        if self.how == "fp8":
            return of_fp8(first, rest[0], self.blocks)[rows]
        return first[rows]

    def release(self, rows: slice = slice(None)) -> None:
        """Gives back the memory of the files that `array` of these rows has read; what is used after all is read again."""
        for part in self.parts.values():
            part.release(slice(None) if self.how == "fp8" else rows)


def tensors(stored: Mapping[str, Stored], published: Mapping[str, Any]) -> dict[str, Tensor]:
    """Tensors by the names that rules know. `published` is config.json. Raises UserError for another quantisation, DamagedError where
    values and scales do not fit each other."""
    options = published.get("quantization_config") or {}
    method = options.get("quant_method", "")
    if method and method not in METHODS:
        raise UserError(
            f"quantization_config.quant_method={method!r} is not read; give a checkpoint in bf16, or in one of {METHODS}"
        )
    found: dict[str, Tensor] = {}
    taken: set[str] = set()
    for name, tensor in stored.items():
        base, scales = name.removesuffix("_blocks"), name.removesuffix("_blocks") + "_scales"
        inverse = f"{name}_scale_inv"
        if name.endswith("_blocks") and scales in stored:
            found[base] = _mxfp4(name, tensor, scales, stored[scales])
            taken |= {name, scales}
        elif inverse in stored:
            found[name] = _fp8(name, tensor, inverse, stored[inverse], options)
            taken |= {name, inverse}
    rest = {name: Tensor(t.shape, {name: t}) for name, t in stored.items() if name not in taken}
    both = rest.keys() & found.keys()
    if both:
        raise DamagedError(
            f"{min(both)} is there whole and quantised ({stored[min(both)].file}); fetch the checkpoint again"
        )
    return found | rest


def require_float(name: str, tensor: Tensor) -> None:
    """Raises UserError where a weight is stored as something that is no number of its own."""
    (stored, *scales) = tensor.parts.values()
    if not scales and stored.dtype not in FLOATS:
        raise UserError(
            f"{stored.file}: tensor {name} is {stored.dtype} without scales; give a checkpoint in bf16, f16 or f32, float8 with "
            f"*_scale_inv or MXFP4 with *_blocks and *_scales"
        )


def _mxfp4(name: str, blocks: Stored, scales_name: str, scales: Stored) -> Tensor:
    byte = TYPES["U8"]
    if (
        len(blocks.shape) != 4
        or (blocks.shape[:-1], blocks.shape[-1]) != (scales.shape, BLOCK // 2)
        or {blocks.dtype, scales.dtype} != {byte}
    ):
        raise DamagedError(
            f"{blocks.file}: {name} is {blocks.dtype}{list(blocks.shape)} and {scales_name} {scales.dtype}{list(scales.shape)}; MXFP4 is "
            f"uint8[E, N, M/32, 16] and uint8[E, N, M/32]"
        )
    experts, columns, groups, _ = blocks.shape
    return Tensor((experts, groups * BLOCK, columns), {name: blocks, scales_name: scales}, "mxfp4")


def _fp8(name: str, values: Stored, scales_name: str, scales: Stored, options: Mapping[str, Any]) -> Tensor:
    block = options.get("weight_block_size")
    if not (isinstance(block, list) and len(block) == 2 and all(isinstance(n, int) and n > 0 for n in block)):
        raise UserError(
            f"{values.file}: {scales_name} needs quantization_config.weight_block_size=[rows, columns] in config.json, not {block!r}"
        )
    wanted = tuple(-(-n // b) for n, b in zip(values.shape, block, strict=False))
    if (
        len(values.shape) != 2
        or values.dtype != TYPES["F8_E4M3"]
        or scales.shape != wanted
        or scales.dtype not in FLOATS
    ):
        raise DamagedError(
            f"{values.file}: {name} is {values.dtype}{list(values.shape)} and {scales_name} {scales.dtype}{list(scales.shape)}; in blocks "
            f"of {block} it is float8_e4m3fn[N, M] with scales {list(wanted)}"
        )
    return Tensor(values.shape, {name: values, scales_name: scales}, "fp8", (block[0], block[1]))


def of_mxfp4(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """u8[E, N, G, 16], u8[E, N, G] -> f32[E, 32 G, N]."""
    halves = np.stack([blocks & 15, blocks >> 4], axis=-1)
    values = MXFP4[halves] * FACTOR[scales][..., None, None]
    return np.moveaxis(values.reshape(*blocks.shape[:2], -1), 1, 2)


def of_fp8(values: np.ndarray, scales: np.ndarray, block: tuple[int, int]) -> np.ndarray:
    """f8[N, M] and a scale for each block -> f32[N, M]."""
    rows = np.repeat(scales.astype(np.float32), block[0], axis=0)[: values.shape[0]]
    return values.astype(np.float32) * np.repeat(rows, block[1], axis=1)[:, : values.shape[1]]
