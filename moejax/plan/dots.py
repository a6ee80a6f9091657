"""FLOPs of a compiled program's matrix products, and of its kernels by their own estimate. A FLOP is a multiplication or an addition."""

from __future__ import annotations

import math
import re
from typing import NamedTuple

from moejax.plan.hlo import Computation, Instruction, Module

CONTRACTED = re.compile(r"lhs_contracting_dims=\{([\d,]*)\}")
LABELS = re.compile(r"dim_labels=(\w+)_(\w+)->(\w+)")
WINDOW = re.compile(r"window=\{([^}]*)\}")
ESTIMATE = re.compile(r'"cost_estimate":\s*\{[^}]*?"flops":"?(\d+)')
TARGET = re.compile(r'custom_call_target="([^"]*)"')
KERNEL = "tpu_custom_call"
LIBRARY = re.compile(r"matmul|dot", re.IGNORECASE)
"""Custom calls of the CPU compiler that are matrix products."""


class Dots(NamedTuple):
    """Of one device, loops multiplied in."""

    products: int
    """FLOPs of dot and convolution instructions."""
    kernels: int
    """FLOPs of custom kernels by their estimates, which take buffers as full."""
    without_estimate: tuple[str, ...]
    """Scopes of custom kernels that say nothing of their cost; they are counted as none."""
    by_scope: dict[str, int]
    """FLOPs of both by the operation's scope in the traced program."""

    @property
    def total(self) -> int:
        return self.products + self.kernels


def of(module: Module) -> Dots:
    """Every matrix product that the program runs."""
    products, kernels, silent = 0, 0, []
    scopes: dict[str, int] = {}
    for instruction, inside, times in module.runs:
        if instruction.opcode in ("dot", "convolution"):
            flops = times * FLOPS[instruction.opcode](instruction, inside)
            products += flops
        elif instruction.opcode == "custom-call" and KERNEL in instruction.attributes:
            estimate = ESTIMATE.search(instruction.attributes)
            flops = times * int(estimate[1]) if estimate else 0
            kernels += flops
            silent += [] if estimate else [instruction.scope]
        else:
            _refuse(instruction)
            continue
        scopes[instruction.scope] = scopes.get(instruction.scope, 0) + flops
    return Dots(products, kernels, tuple(silent), scopes)


def kernels(module: Module) -> dict[str, int]:
    """How often each custom kernel runs, by the operation's scope."""
    found: dict[str, int] = {}
    for instruction, _, times in module.runs:
        if instruction.opcode == "custom-call" and KERNEL in instruction.attributes:
            found[instruction.scope] = found.get(instruction.scope, 0) + times
    return found


def _of_dot(dot: Instruction, inside: Computation) -> int:
    """2 * result * contraction."""
    contracted = CONTRACTED.search(dot.attributes)
    left = inside.instructions[dot.operands[0]].shapes[0].dims
    over = [left[int(d)] for d in contracted[1].split(",") if d] if contracted else []
    return 2 * math.prod(dot.shapes[0].dims) * math.prod(over)


def _of_convolution(conv: Instruction, inside: Computation) -> int:
    """2 * pairs of a result and a weight that meet an entry of the input: not padding, and not a hole between dilated entries.

    The TPU compiler writes matrix products as convolutions, with batch dimensions as windows of which one entry counts. Groups of features
    are in the weights' shape and groups of the batch in the result's.
    """
    left, right = (inside.instructions[o].shapes[0].dims for o in conv.operands[:2])
    labels = LABELS.search(conv.attributes)
    assert labels is not None, f"{conv.name}: a convolution without dim_labels"
    inputs, weights, results = labels.groups()
    window = WINDOW.search(conv.attributes)
    options = dict(part.split("=") for part in window[1].split()) if window else {}
    sizes = _by_dimension(options.get("size"), 1)
    strides, dilations, holes = (
        _by_dimension(options.get(k), 1, len(sizes)) for k in ("stride", "rhs_dilate", "lhs_dilate")
    )
    pads = [int(p.partition("_")[0]) for p in options["pad"].split("x")] if "pad" in options else [0] * len(sizes)
    pairs = 1
    for axis, size in enumerate(sizes):
        entries = left[inputs.index(str(axis))]
        length = (entries - 1) * holes[axis] + 1
        places = range(conv.shapes[0].dims[results.index(str(axis))])
        pairs *= sum(
            _met(place * strides[axis] - pads[axis], size, dilations[axis], holes[axis], length) for place in places
        )
    batch = conv.shapes[0].dims[results.index("b")] * conv.shapes[0].dims[results.index("f")]
    return 2 * batch * right[weights.index("i")] * pairs


def _met(first: int, size: int, dilation: int, hole: int, length: int) -> int:
    """Entries of a window from `first` on that lie on an entry of the input."""
    places = (first + k * dilation for k in range(size))
    return sum(1 for place in places if 0 <= place < length and place % hole == 0)


def _by_dimension(text: str | None, default: int, number: int = 0) -> list[int]:
    return [int(n) for n in text.split("x")] if text else [default] * number


def _refuse(instruction: Instruction) -> None:
    """A library's product would be left out in silence."""
    if instruction.opcode == "custom-call":
        target = TARGET.search(instruction.attributes)
        if target and LIBRARY.search(target[1]):
            raise ValueError(f"{instruction.name} calls {target[1]}, a matrix product that is not counted")


FLOPS = {"dot": _of_dot, "convolution": _of_convolution}
