"""Sums leave a step reduced over the mesh, in one reduction for each type of number (B18)."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
from train import small

from moejax import sharding
from moejax.arrays import Batch
from moejax.moe.inputs import Mode
from moejax.train import losses, step

SIZES = {"data": 2, "fsdp": 2, "expert": 2}
ALONE = small.COMPILER | {"xla_disable_hlo_passes": "cpu-all-reduce-combiner,all-reduce-combiner"}
"""Compiler options under which reductions stay as they were written."""
LAYOUT = sharding.LAYOUTS["hidden"]
TOKEN_SUMS, BY_SHARD, REDUCED = (
    functools.partial(f, layout=LAYOUT) for f in (losses.token_sums, losses.by_shard, losses.reduced)
)


def reductions(compiled):
    """All-reduces of a compiled program, those in loops once."""
    return len(re.findall(r"\ball-reduce(?:-start)?\(", compiled.as_text()))


def test_token_sums_leave_out_invalid_tokens(mesh_of):
    """B2: what is not valid counts nowhere, even where it is NaN."""
    valid, ids = np.array([[True, False, True]]), jnp.zeros((1, 3), jnp.int32)
    with jax.set_mesh(mesh_of()):
        batch = Batch(ids, ids, ids, jnp.asarray(valid), ids, jnp.zeros(1, jnp.int32))
        sums = small.quick_jit(TOKEN_SUMS)(jnp.array([[1.0, np.nan, 2.0]]), batch)
    assert float(sums["nats"][0]) == 3.0 and int(sums["targets"][0]) == 2 and sums["targets"].dtype == np.int32


def test_sums_by_shard_move_nothing(mesh_of):
    """Of arrays of any rank: each device sums what it has."""
    mesh = mesh_of(**SIZES)
    for shape in ((16, 8), (16, 8, 3), (8, 16, 8)):
        x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
        placed = jax.device_put(x, sharding.batch_sharding(mesh))
        with jax.set_mesh(mesh):
            compiled = small.quick_jit(BY_SHARD).lower(placed).compile()
            small.close(compiled(placed), x.reshape(8, -1, *shape[1:]).sum(axis=(1, 2)), 1e-6)
        assert not re.search(r"all-|collective", compiled.as_text())


def test_reduced_is_a_sum(mesh_of):
    """Every array is the sum over its leading axis, in its own type and shape, and the mesh reduces once for each type."""
    rng, mesh = np.random.default_rng(0), mesh_of(**SIZES)
    tree = {
        "a": rng.normal(size=(8, 3, 4)).astype(np.float32),
        "b": {"c": rng.integers(0, 2**27, (8, 5)).astype(np.int32), "d": rng.normal(size=8).astype(np.float32)},
        "e": rng.integers(0, 9, (8, 2, 1, 2)).astype(np.int32),
        "f": np.zeros((8, 0), np.int32),
    }
    shards = jax.NamedSharding(mesh, sharding.spec("shard"))
    placed = jax.tree.map(lambda x: jax.device_put(x, shards), tree)
    with jax.set_mesh(mesh):
        compiled = jax.jit(REDUCED, compiler_options=ALONE).lower(placed).compile()
        found = compiled(placed)
    wanted = jax.tree.map(lambda x: x.sum(axis=0, dtype=x.dtype), tree)
    small.close(found, wanted, 1e-6)
    assert [x.dtype for x in jax.tree.leaves(found)] == [x.dtype for x in jax.tree.leaves(tree)]
    assert reductions(compiled) == 2


def test_b18_statistics_add_no_reduction():
    """B18: an evaluation step that returns all its sums, over two layers, reduces over the mesh as often as one that returns
    the loss alone, or once more."""
    options = {"model.repeats": 2, "model.moe.router": "noisy_topk", "model.moe.quantile_bias": 1.0}
    cfg = small.configure(**{f"mesh.{k}": v for k, v in SIZES.items()} | options)
    built, start = small.begin(cfg)
    batch = small.place(small.arrays(0), built.mesh)

    def sums_of(state, batch):
        at = step.Setting(jax.random.key(0), state.routing, state.step)
        return step.sums_of(built, state.parameters, batch, at, Mode(False, None, label_kinds=2))[0]

    def loss_of(state, batch):
        sums = sums_of(state, batch)
        return sums["nats"] / sums["targets"]

    with jax.set_mesh(built.mesh):
        everything, loss = (
            jax.jit(f, compiler_options=ALONE).lower(start, batch).compile() for f in (sums_of, loss_of)
        )
    assert 0 < reductions(loss) <= reductions(everything) <= reductions(loss) + 1
