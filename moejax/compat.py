"""The only file that knows that jax has versions (0.10 to 0.12)."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.extend


def varying_axes(x: jax.Array) -> frozenset[str]:
    """Mesh axes over which x differs between devices inside shard_map."""
    kind = jax.typeof(x)
    return frozenset(kind.mat.varying if hasattr(kind, "mat") else kind.vma)


def without_varying(function: Any, *arrays: Any, **named: Any) -> Any:
    """function(*arrays) inside shard_map, traced as if no array varied over mesh axes; what it returns varies as they do.

    For the interpreter of TPU kernels, which forgets of some of its numbers that they vary. One operation that nothing looks into,
    so that scans and derivatives around it do not trace it again."""
    from jax._src import config

    leaves, tree = jax.tree.flatten((arrays, named))
    axes = tuple(sorted({axis for x in leaves for axis in varying_axes(x)}))
    if not axes:
        return function(*arrays, **named)

    def flat(*leaves: jax.Array) -> Any:
        arrays, named = jax.tree.unflatten(tree, leaves)
        return function(*arrays, **named)

    with config._check_vma(False):
        traced, shapes = jax.make_jaxpr(flat, return_shape=True)(*leaves)
    like = next(x for x in leaves if varying_axes(x) == frozenset(axes))
    results = tuple(jax.typeof(like).update(shape=r.shape, dtype=r.dtype, weak_type=False) for r in traced.out_avals)
    return jax.tree.unflatten(jax.tree.structure(shapes), _opaque().bind(*leaves, call_jaxpr=traced, results=results))


@functools.cache
def _opaque() -> Any:
    """An operation that is a traced function, whole."""
    from jax._src.interpreters import mlir

    primitive = jax.extend.core.Primitive("opaque")
    primitive.multiple_results = True
    primitive.def_effectful_abstract_eval(lambda *_, call_jaxpr, results: (list(results), call_jaxpr.effects))

    def lower(context: Any, *arrays: Any, call_jaxpr: Any, results: Any) -> Any:
        return mlir.core_call_lowering(context, *arrays, name="opaque", call_jaxpr=call_jaxpr)

    mlir.register_lowering(primitive, lower, cacheable=False)
    return primitive


OVERLAP = {"xla_tpu_enable_async_all_to_all": "true", "xla_tpu_enable_all_experimental_scheduler_features": "true"}
"""Options of the TPU compiler under which exchanges start early and end late, with computation in between."""


def overlapping(platform: str) -> dict[str, dict[str, str]]:
    """What jax.jit is told so that collectives run under computation, on a platform whose compiler has to be asked."""
    return {"compiler_options": OVERLAP} if platform == "tpu" else {}


def quick_compile() -> dict[str, int] | None:
    """Compiler options for what runs once: on CPU, compiling random bits takes longer than drawing them ever will."""
    return {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None


def shaped_like(x: jax.Array, shape: tuple[int, ...], dtype: jax.typing.DTypeLike) -> jax.ShapeDtypeStruct:
    """The type of an array made from x by a kernel: inside shard_map it varies over the same mesh axes."""
    kind = jax.typeof(x)
    if hasattr(kind, "mat"):
        return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=kind.mat)
    return jax.ShapeDtypeStruct(shape, dtype, vma=kind.vma)  # pyright: ignore[reportCallIssue]


def gpu_interpreter() -> Any:
    """Parameters of the interpreter of Mosaic GPU kernels on a CPU, as strict as the version has them.

    Up to jax 0.11 it does not know that TMA reads zeros out of bounds: memory that nobody wrote is zero there, and NaN later.
    """
    from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

    if jax.__version_info__ >= (0, 12):
        return InterpretGPUParams(detect_races=True, uninitialized_memory="nan", out_of_bounds_reads="raise")
    return InterpretGPUParams(detect_races=True, uninitialized_memory="zero", out_of_bounds_reads="uninitialized")


def interpreted_races() -> bool:
    """Whether the kernel that was interpreted last had a race."""
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks

    return gpu_callbacks.get_races().races_found


def transposed_ref(ref: Any) -> Any:
    """The transposed view of a matrix in a GPU's shared memory."""
    from jax.experimental.pallas import mosaic_gpu

    return ref.transpose((1, 0)) if jax.__version_info__ >= (0, 12) else mosaic_gpu.transpose_ref(ref, (1, 0))


def load_shared(ref: Any, layout: Any, interpret: Any) -> jax.Array:
    """The values of a ref in a GPU's shared memory, in registers laid out so. The interpreter knows this load from jax 0.12 on."""
    from jax.experimental.pallas import mosaic_gpu

    if jax.__version_info__ >= (0, 12):
        return mosaic_gpu.load(ref, layout=layout)  # pyright: ignore[reportCallIssue]
    return ref[...] if interpret else mosaic_gpu.load(ref, (), layout=layout)


def tpu_interpreter() -> Any:
    """Parameters of the interpreter of TPU kernels on a CPU."""
    from jax.experimental.pallas import tpu

    return tpu.InterpretParams()
