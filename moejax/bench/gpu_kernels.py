"""The Hopper kernels against `lax.ragged_dot`, tokamax and a dense matmul of the same FLOPs, on one NVIDIA GPU.

Every case is checked against `lax.ragged_dot` before it is timed: a share of the dense speed is worth nothing if the numbers are wrong.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moejax import config
from moejax.bench import timing
from moejax.bench.shapes import SHAPES, Shape
from moejax.errors import UserError
from moejax.kernels import chips
from moejax.kernels.chips import ChipSpec
from moejax.kernels.grouped_matmul import pallas_gpu

KINDS = "forward", "input gradient", "weight gradient", "layer"
"""What is timed; a layer is the forward and backward pass of its experts, without biases."""
WRONG = 0.02
"""Error relative to the norm of the result, from which on a result counts as wrong; rounding to bf16 makes 0.004."""

LOADS: dict[str, Callable[[np.random.Generator, int], np.ndarray]] = {
    "uniform": lambda rng, experts: np.full(experts, 1 / experts),
    "zipf": lambda rng, experts: rng.permutation(np.arange(1, experts + 1) ** -1.2),
    "one_hot": lambda rng, experts: np.eye(experts)[experts // 2],
}
"""Shares of the experts, from which their rows are drawn: equal, Zipf's law of exponent 1.2 in random order, or all for one."""


@dataclasses.dataclass(frozen=True)
class Operands:
    """One layer's arrays, normal with variance one over the contraction where they are weights."""

    x: jax.Array
    gate: jax.Array
    up: jax.Array
    down: jax.Array
    dy: jax.Array
    sizes: jax.Array


def run(cfg: config.Config, rounds: int) -> dict[str, Any]:
    """TFLOP/s of every kernel for every published shape and load: median, 10th and 90th percentile."""
    device = jax.devices()[0]
    chip = chips.of(device.device_kind)
    if chip is None or chip.platform != "gpu":
        raise UserError(
            f"bench gpu_kernels on {device.device_kind!r}: it needs an NVIDIA GPU of the Hopper kind (H100 or H200) and JAX for "
            'CUDA; pip install "jax[cuda13]" on a machine with one'
        )
    shapes = {name: shape for name, shape in SHAPES.items() if _taken(shape)}
    rows = [case(shape, name, load, chip, rounds) for name, shape in shapes.items() for load in LOADS]
    return {"rounds": rounds, "machine": timing.machine(), "tokamax": _tokamax_version(), "rows": rows}


def case(
    shape: Shape,
    name: str,
    load: str,
    chip: ChipSpec,
    rounds: int,
    kinds: tuple[str, ...] = KINDS,
    *,
    interpret: Any = False,
    seed: int = 0,
) -> dict[str, Any]:
    """One shape and load: everything in turn. An implementation that fails says why in the place of its numbers."""
    rng = np.random.default_rng(seed)
    shares = LOADS[load](rng, shape.experts)
    sizes = rng.multinomial(shape.rows, shares / shares.sum())
    operands = operands_of(shape, sizes, seed)
    result: dict[str, Any] = {"shape": name, "load": load, "max_load_over_mean": float(sizes.max() / sizes.mean())}
    tables = implementations(shape, operands, chip, interpret)
    for kind in kinds:
        first, failed = {}, {}
        for who, functions in tables.items():
            try:
                first[who] = jax.block_until_ready(functions[kind]())
            except Exception as error:
                failed[who] = f"failed: {(str(error) or type(error).__name__).splitlines()[0][:120]}"
        judged = [who for who in first if who != "dense" and "ragged_dot" in first]
        errors = {who: timing.error_of(first[who], first["ragged_dot"]) for who in judged}
        measured = _tflops({who: tables[who][kind] for who in first}, _flops(shape, kind), rounds)
        for who, speed in measured.items():
            speed["of_dense"] = speed["median"] / measured["dense"]["median"]
            if who in errors:
                speed["error"] = errors[who]
        result[kind] = {**measured, **failed}
    return result


def implementations(
    shape: Shape, o: Operands, chip: ChipSpec, interpret: Any
) -> dict[str, dict[str, Callable[[], Any]]]:
    """For each the KINDS, as calls."""
    ours = _ours(shape, chip, interpret)
    by_dot: dict[str, Any] = {"ragged_dot": jax.lax.ragged_dot}
    if importlib.util.find_spec("tokamax"):
        import tokamax  # pyright: ignore[reportMissingImports]

        by_dot["tokamax"] = tokamax.ragged_dot
    tables = {"pallas_gpu": ours, **{who: _of_dot(shape, dot) for who, dot in by_dot.items()}, "dense": _dense(shape)}
    arguments = {
        "forward": (o.x, o.up, o.sizes),
        "input gradient": (o.dy, o.down, o.sizes),
        "weight gradient": (o.x, _hidden(o), o.sizes),
        "layer": (o.x, o.gate, o.up, o.down, o.dy, o.sizes),
    }
    return {
        who: {kind: _bound(jax.jit(function), arguments[kind]) for kind, function in table.items()}
        for who, table in tables.items()
    }


def _bound(function: Callable[..., Any], arguments: tuple[jax.Array, ...]) -> Callable[[], Any]:
    return lambda: function(*arguments)


def _ours(shape: Shape, chip: ChipSpec, interpret: Any) -> dict[str, Callable[..., Any]]:
    """The kernels."""
    common = {"chip": chip, "interpret": interpret}
    start = jnp.int32(0)

    def forward(x, w, sizes, transpose_w=False):
        return pallas_gpu.matmul((x,), (w,), sizes, start, transpose_w=transpose_w, out_dtype=x.dtype, **common)

    def weight_gradient(x, dy, sizes):
        return pallas_gpu.weight_gradient(x, dy, sizes, start, out_dtype=x.dtype, **common)

    def layer(x, gate, up, down, dy, sizes):
        a, h_gate, h_up = pallas_gpu.glu(x, gate, up, sizes, start, activation=shape.activation, **common)
        y = forward(a, down, sizes)
        da = forward(dy, down, sizes, transpose_w=True)
        d_gate, d_up = shape.activation.gradient(h_gate, h_up, da)
        dh = jnp.asarray(d_gate, x.dtype), d_up.astype(x.dtype)
        dx = pallas_gpu.matmul(dh, (gate, up), sizes, start, transpose_w=True, out_dtype=x.dtype, **common)
        return y, dx, *(weight_gradient(x, d, sizes) for d in dh), weight_gradient(a, dy, sizes)

    return {
        "forward": forward,
        "input gradient": lambda dy, w, sizes: forward(dy, w, sizes, transpose_w=True),
        "weight gradient": weight_gradient,
        "layer": layer,
    }


def _of_dot(shape: Shape, dot: Callable[..., jax.Array]) -> dict[str, Callable[..., Any]]:
    """The same from a differentiable grouped matmul."""

    def experts(x, gate, up, down, sizes):
        a = shape.activation.value(dot(x, gate, sizes), dot(x, up, sizes)).astype(x.dtype)
        return dot(a, down, sizes)

    def input_gradient(dy, w, sizes):
        like = jnp.zeros((dy.shape[0], w.shape[1]), dy.dtype)
        return jax.vjp(lambda x: dot(x, w, sizes), like)[1](dy)[0]

    def weight_gradient(x, dy, sizes):
        like = jnp.zeros((sizes.shape[0], x.shape[1], dy.shape[1]), x.dtype)
        return jax.vjp(lambda w: dot(x, w, sizes), like)[1](dy)[0]

    def layer(x, gate, up, down, dy, sizes):
        y, pull = jax.vjp(functools.partial(experts, sizes=sizes), x, gate, up, down)
        return y, *pull(dy)

    return {"forward": dot, "input gradient": input_gradient, "weight gradient": weight_gradient, "layer": layer}


def _dense(shape: Shape) -> dict[str, Callable[..., Any]]:
    """As many FLOPs as one matmul, or for the layer as one expert for all rows."""

    def dot(x: jax.Array, w: jax.Array, group_sizes: jax.Array) -> jax.Array:
        return x @ w[0]

    table = _of_dot(shape, dot)
    return {
        "forward": dot,
        "input gradient": lambda dy, w, sizes: dy @ w[0].T,
        "weight gradient": lambda x, dy, sizes: x.T @ dy,
        "layer": lambda x, gate, up, down, dy, sizes: table["layer"](x, gate[:1], up[:1], down[:1], dy, sizes),
    }


def operands_of(shape: Shape, sizes: np.ndarray, seed: int) -> Operands:
    """Random ones for groups of these sizes."""
    M, D, F, E = shape.rows, shape.width, shape.hidden, shape.experts
    keys = jax.random.split(jax.random.key(seed), 5)

    @jax.jit
    def normal(key: jax.Array, like: jax.Array, deviation: jax.Array) -> jax.Array:
        return (jax.random.normal(key, like.shape, jnp.bfloat16) * deviation.astype(jnp.bfloat16)).astype(jnp.bfloat16)

    dims = {"x": (M, D), "gate": (E, D, F), "up": (E, D, F), "down": (E, F, D), "dy": (M, D)}
    arrays = {
        name: normal(key, jnp.zeros(d, jnp.bfloat16), jnp.float32(1 if len(d) == 2 else d[1] ** -0.5))
        for key, (name, d) in zip(keys, dims.items(), strict=True)
    }
    return Operands(**arrays, sizes=jnp.asarray(sizes, jnp.int32))


def _hidden(o: Operands) -> jax.Array:
    """Cotangents as wide as the hidden layer: normal too."""
    return jax.random.normal(jax.random.key(1), (o.x.shape[0], o.up.shape[2]), o.x.dtype)


def _flops(shape: Shape, kind: str) -> int:
    return 3 * shape.flops if kind == "layer" else 2 * shape.rows * shape.width * shape.hidden


def _tflops(functions: dict[str, Callable[[], Any]], flops: int, rounds: int) -> dict[str, dict[str, float]]:
    speeds = {who: flops / np.asarray(s) / 1e12 for who, s in timing.bursts(functions, rounds).items()}
    quantiles = {"median": 50, "low": 10, "high": 90}
    return {who: {q: float(np.percentile(s, p)) for q, p in quantiles.items()} for who, s in speeds.items()}


def _taken(shape: Shape) -> bool:
    like = jax.ShapeDtypeStruct((shape.rows, shape.width), jnp.bfloat16)
    weight = jax.ShapeDtypeStruct((shape.experts, shape.width, shape.hidden), jnp.bfloat16)
    return shape.activation.gated and pallas_gpu.supports(like, weight)


def _tokamax_version() -> str:
    if importlib.util.find_spec("tokamax") is None:
        return "not installed"
    from importlib import metadata

    return metadata.version("tokamax")


def table(result: dict[str, Any]) -> str:
    """The numbers for a person."""
    lines = [", ".join(f"{k} {v}" for k, v in result["machine"].items()), f"tokamax {result['tokamax']}"]
    lines.append(f"{result['rounds']} rounds in turn; TFLOP/s, median (10 to 90 %), and share of the dense matmul")
    for row in result["rows"]:
        lines.append(f"{row['shape']}, {row['load']} (load {row['max_load_over_mean']:.1f}x)")
        for kind in (kind for kind in KINDS if kind in row):
            cells = [_cell(who, numbers) for who, numbers in row[kind].items()]
            lines.append(f"  {kind:16}" + "   ".join(cells))
    return "\n".join(lines)


def _cell(who: str, numbers: dict[str, float] | str) -> str:
    if isinstance(numbers, str):
        return f"{who} {numbers}"
    wrong = " WRONG" if not numbers.get("error", 0) < WRONG else ""
    spread = f"({numbers['low']:.0f}-{numbers['high']:.0f})"
    return f"{who} {numbers['median']:.0f} {spread} {100 * numbers['of_dense']:.0f} %{wrong}"
