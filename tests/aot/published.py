"""Whole training steps of published families, compiled for TPU topologies. Run by test_published.

python published.py '[{"family": "gpt_oss", "topology": "v5p:2x2x2", "mesh": {"fsdp": 2, "expert": 4}}]'
"""

import dataclasses
import json
import pathlib
import sys

import compiled  # first: it says what JAX may touch
import jax
import jax.numpy as jnp

from moejax import config, sharding
from moejax.arrays import Batch
from moejax.checkpoint.hugging_face.published import open_published
from moejax.data import batches
from moejax.train import check, guard, state, step

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
ROWS, CONTEXT = 16, 64


def struct(x, where):
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)


def program(case):
    """{"all_to_all": exchanges of the compiled step, "temporary": bytes a device} of a family with experts exchanged, in bf16."""
    on, model = compiled.mesh_of(case), open_published(GOLDEN / case["family"]).model
    moe = dataclasses.replace(model.moe, transport="ragged")
    model = dataclasses.replace(model, compute_dtype="bfloat16", remat="selective", moe=moe)
    data = config.Data(context=CONTEXT, batch=ROWS)
    cfg = config.Config(model=model, mesh=config.Mesh(**case["mesh"]), data=data)
    check.check(dataclasses.replace(cfg, model=dataclasses.replace(model, vocab_size=264, loss_chunk=264)))
    with jax.set_mesh(on):
        built, whole = state.build(cfg, on), sharding.replicated(on)
        begun = state.template(built)
        moments = jax.eval_shape(built.transform.init, begun.parameters)
        moments = jax.tree.map(lambda x: struct(x, x.sharding if x.ndim else whole), moments)
        watched = jax.tree.map(lambda x: struct(x, whole), jax.eval_shape(guard.init))
        begun = dataclasses.replace(begun, optimizer=moments, guard=watched)
        where, kinds = batches.shardings(on), {"valid": jnp.bool_}
        shapes = {"row_ids": (ROWS,)}
        names = ("tokens", "targets", "segments", "valid", "labels", "row_ids")
        rows = {
            name: jax.ShapeDtypeStruct(
                shapes.get(name, (ROWS, CONTEXT)), kinds.get(name, jnp.int32), sharding=getattr(where, name)
            )
            for name in names
        }
        made = step.make_train_step(built, begun).lower(begun, Batch(**rows)).compile()
    return {"all_to_all": made.as_text().count("all-to-all("), "temporary": made.memory_analysis().temp_size_in_bytes}


if __name__ == "__main__":
    print(json.dumps([program(case) for case in json.loads(sys.argv[1])]))
