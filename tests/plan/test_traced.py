"""FLOPs of steps as they are traced, against the program that is compiled from them and against what is worked out by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from train import small

from moejax import mesh
from moejax.errors import ConfigError
from moejax.plan import dots, hlo, programs, traced

B, T, D, H, KV, HEAD, F = 8, 16, 16, 2, 1, 8, 24
"""Rows, positions, width, heads, key heads, head size, dense hidden width of tests/train/small.py."""
E, K, EXPERT = 8, 2, 8
"""Experts, choices, hidden width of an expert."""
DENSE = {"model.pattern": ("attention+dense",)}
SPARSE = {"model.moe.kernel": "reference"}
EIGHT = {"mesh.data": 2, "mesh.fsdp": 2, "mesh.expert": 2}


@functools.cache
def built(step, options):
    """The program of a step, and the mesh that it is for."""
    cfg = small.configure(**dict(options))
    on = mesh.make(cfg.mesh, jax.devices()[: int(np.prod(mesh.shape(cfg.mesh)))])
    with jax.set_mesh(on):
        return programs.build(step, cfg, on), on


def executed(step, **options):
    """What the step is traced to do."""
    program, on = built(step, tuple(options.items()))
    with jax.set_mesh(on):
        return traced.executed(program.step, *program.arguments)


def compiled(step, **options):
    """FLOPs of the program's products when it is compiled for CPU."""
    program, on = built(step, tuple(options.items()))
    with jax.set_mesh(on):
        made = program.step.lower(*program.arguments).compile(compiler_options=small.COMPILER)
    return dots.of(hlo.Module(made.as_text())).products


CASES = {
    "dense on eight": ("train", DENSE | EIGHT),
    "dense evaluated": ("eval", DENSE),
    "dense prefilled": ("prefill", DENSE),
    "dense decoded": ("decode", DENSE | EIGHT),
    "sparse on eight": ("eval", SPARSE | EIGHT),
    "sparse gathered on eight": ("eval", SPARSE | EIGHT | {"model.moe.transport": "gather"}),
    "sparse decoded": ("decode", SPARSE | EIGHT),
}


@pytest.mark.parametrize("name", CASES)
def test_the_compiler_makes_what_was_traced(name):
    """The reference kernel is plain products, so that nothing is hidden from either count."""
    step, options = CASES[name]
    assert executed(step, **options) == (compiled(step, **options), 0)


def test_a_dense_step_by_hand():
    """Forward, and twice as much backward; all scores of a row are computed. The loss is recomputed in chunks."""
    projections = 2 * D * HEAD * (H + 2 * KV) + 2 * H * HEAD * D
    layer = B * T * (projections + 2 * 2 * T * H * HEAD + 3 * 2 * D * F)
    logits = 2 * B * T * D * small.V
    assert executed("eval", **DENSE).flops == layer + logits
    assert executed("train", **DENSE).flops == 3 * layer + 4 * logits


def test_what_is_recomputed():
    """Under `full` everything of the layer but its last product, whose result no derivative needs."""
    last = 2 * B * T * F * D
    layer = executed("eval", **DENSE).flops - 2 * B * T * D * small.V
    found = {remat: executed("train", **DENSE, **{"model.remat": remat}).flops for remat in ("none", "full")}
    assert found["full"] - found["none"] == layer - last


def test_microbatches_read_the_batch_once_more():
    """A pass forward for sums of the whole batch, but for the few products that add up numbers of microbatches."""
    once, parts = (executed("train", **SPARSE, **{"train.microbatches": n}).flops for n in (1, 2))
    assert 0 <= parts - once - executed("eval", **SPARSE).flops < 100
    assert 0 <= parts - compiled("train", **SPARSE, **{"train.microbatches": 2}) < 100


def test_grouped_products_count_rows():
    """XLA's own takes a row through one expert, the reference through all: of three products forward and six backward, the other seven."""
    ragged = executed("train", **{"model.moe.kernel": "xla"})
    rows = B * T * K
    assert (
        executed("train", **SPARSE).flops - ragged.flops == 9 * (E - 1) * 2 * rows * D * EXPERT
        and ragged.open_loops == 0
    )


def test_one_device_of_eight():
    """An eighth of what one device alone would do, routing and experts too."""
    for step in ("train", "decode"):
        assert 8 * executed(step, **SPARSE, **EIGHT).flops == executed(step, **SPARSE).flops


@pytest.mark.parametrize("step", programs.STEPS)
def test_every_step_traces(step):
    """Positions that a call reads, and the bytes of one device's part of arrays that lie as its arguments do."""
    program, on = built(step, tuple((SPARSE | EIGHT).items()))
    assert program.tokens == (B if step == "decode" else B * T)
    assert executed(step, **SPARSE, **EIGHT).flops > 0
    with jax.set_mesh(on):
        lies = lambda x: jax.NamedSharding(on, x.sharding.spec)  # noqa: E731
        arrays = jax.tree.map(lambda x: jax.device_put(np.zeros(x.shape, x.dtype), lies(x)), program.arguments)
    first = on.devices.flat[0]
    held = [s.data.nbytes for x in jax.tree.leaves(arrays) for s in x.addressable_shards if s.device == first]
    assert programs.bytes_of(program) == sum(held)


def test_an_unknown_step_is_an_error(mesh_of):
    with pytest.raises(ConfigError, match="train, eval, prefill, decode"):
        programs.build("sleep", small.configure(), mesh_of())


W = jax.ShapeDtypeStruct((32, 32), jnp.float32)
ONE = 2 * 32**3


@pytest.mark.parametrize(
    "body, products, loops",
    [
        (lambda x: jax.lax.scan(lambda c, _: (c @ x, None), x, None, length=5)[0], 5, 0),
        (lambda x: jax.lax.cond(x[0, 0] > 0, lambda: x @ x @ x, lambda: x @ x), 2, 0),
        (lambda x: x @ jax.lax.while_loop(lambda c: c[0, 0] > 0, lambda c: c @ x, x), 1, 1),
        (lambda x: (x @ x, (x @ x @ x))[0], 1, 0),
    ],
    ids=["loop", "the longer branch", "a loop without an end", "what no result needs"],
)
def test_control_flow(body, products, loops):
    assert traced.executed(jax.jit(body), W) == (products * ONE, loops)
