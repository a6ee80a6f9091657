"""FLOPs that a traced step executes on one device: every matrix product of its jaxpr, recomputation and masked scores included.

This is what the program asks for, before a compiler sees it; `plan.dots` counts what the compiler made of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

from jax.extend.core import Jaxpr
from jax.interpreters import partial_eval


class Executed(NamedTuple):
    flops: int
    """Of one device."""
    open_loops: int
    """Loops without a static bound, which count no turn: further rounds of an exchange."""


def executed(step: Any, *arguments: Any) -> Executed:
    """Of a jitted function on arrays or their shapes. What no result needs is left out."""
    closed = step.trace(*arguments).jaxpr
    used, _ = partial_eval.dce_jaxpr(closed.jaxpr, [True] * len(closed.jaxpr.outvars))
    return _of(used)


def _of(jaxpr: Jaxpr) -> Executed:
    flops, loops = 0, 0
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        if name in PRODUCTS:
            flops += PRODUCTS[name](equation)
        elif name == "while":
            loops += 1
        elif name == "cond":
            branches = [_of(b.jaxpr) for b in equation.params["branches"]]
            flops, loops = flops + max(b.flops for b in branches), loops + max(b.open_loops for b in branches)
        else:
            for child in _children(equation.params):
                inner = _of(child)
                flops += inner.flops * equation.params.get("length", 1)
                loops += inner.open_loops
    return Executed(flops, loops)


def _children(params: dict[str, Any]) -> Iterator[Jaxpr]:
    """Jaxprs that an equation runs once (a scan: each turn). A function with a derivative of its own keeps that one as a thunk."""
    for value in params.values():
        for one in value if isinstance(value, (tuple, list)) else (value,):
            inner = getattr(one, "jaxpr", one)
            if isinstance(inner, Jaxpr):
                yield inner


def _of_dot(equation: Any) -> int:
    """2 * result * contraction, over the devices that the operands are spread over."""
    left, right = (v.aval for v in equation.invars[:2])
    (over, _), _ = equation.params["dimension_numbers"]
    whole = 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(left.shape[d] for d in over)
    axes = {axis for operand in (left, right) for axis in _axes(operand)}
    sizes = left.sharding.mesh.shape
    return whole // math.prod(sizes[axis] for axis in axes)


def _axes(operand: Any) -> Iterator[str]:
    """Mesh axes that an array is spread over by its type; inside shard_map none, where shapes are a device's own."""
    for entry in operand.sharding.spec.partitions:
        yield from (entry if isinstance(entry, tuple) else () if entry is None else (entry,))


def _of_ragged(equation: Any) -> int:
    """Rows of the whole buffer times a group's weights, as kernels take it; or, for the gradient of weights, every row once."""
    left, right = (v.aval for v in equation.invars[:2])
    free = [n for d, n in enumerate(right.shape) if d not in _right_dims(equation)]
    return 2 * math.prod(left.shape) * math.prod(free)


def _right_dims(equation: Any) -> set[int]:
    """Dimensions of the weights that rows do not multiply out: contracted, of the batch, or the groups."""
    numbers = equation.params["ragged_dot_dimension_numbers"]
    (_, over), (_, batch) = numbers.dot_dimension_numbers
    return {*over, *batch, *numbers.rhs_group_dimensions}


def _of_kernel(equation: Any) -> int:
    estimate = equation.params["cost_estimate"]
    return 0 if estimate is None else int(estimate.flops)


PRODUCTS = {"dot_general": _of_dot, "ragged_dot_general": _of_ragged, "pallas_call": _of_kernel}
