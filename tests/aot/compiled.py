"""The sparse layer compiled for TPU topologies on a machine without one: its collectives as JSON. Run by test_collectives.

python compiled.py '[{"topology": "v5p:2x2x2", "mesh": {"fsdp": 2, "expert": 4}, "moe": {"transport": "gather"}}]'
"""

import json
import os
import sys

os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from moejax import config, mesh, sharding
from moejax.bench import collectives
from moejax.kernels.grouped_mlp import Weights
from moejax.models import remat
from moejax.moe import experts, inputs, layer, noise
from moejax.moe.routers import ROUTERS

D, F, T, EACH = 256, 384, 128, 2
"""Width, hidden width, positions of a row, rows of a batch shard; no two alike, so that a shape says what an array is."""


def arguments(moe, on):
    """Shapes and shardings of x, parameters and tokens."""

    def of(shape, dtype, *names):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=jax.NamedSharding(on, sharding.spec(*names)))

    rows, E = EACH * sharding.shards(on, "batch"), moe.num_experts
    x = of((rows, T, D), jnp.bfloat16, "batch", "position", None)
    flags, ids = of((rows, T), jnp.bool_, "batch", None), of((rows, T), jnp.int32, "batch", None)
    dims = experts.dims(sharding.LAYOUTS[moe.tensor])
    weights = Weights(**{n: of(s, jnp.float32, *dims[n]) for n, s in experts.shapes(moe, E, D, F).items()})
    heads = {
        name: of((D, columns), jnp.float32, None, None) for name, columns in ROUTERS[moe.router].heads(moe).items()
    }
    tokens = inputs.Tokens(flags, ids, of((rows,), jnp.int32, "batch"), ids)
    return x, layer.Parameters(heads, (weights,), None), tokens, of((), jnp.int32)


def mesh_of(case):
    """The case's mesh, on one slice or several of its topology."""
    slices = {"num_slices": case["slices"]} if "slices" in case else {}
    topology = topologies.get_topology_desc(platform="tpu", topology_name=case["topology"], **slices)
    return mesh.make(config.Mesh(**case["mesh"]), topology.devices)


def compiled(case):
    """Collectives forward, and forward and backward, or of the `parts` of the case alone."""
    on = mesh_of(case)
    moe = config.MoE(**case["moe"])

    def routed(x, parameters, tokens, step):
        moment = inputs.Moment(noise.step_key(0, step), jnp.int32(0), step)
        mode = inputs.Mode(True, moe.capacity_factor)
        return layer.sparse_layer(x, None, tokens, parameters, {}, moment, moe, mode).routed

    def loss(x, *others):
        if "remat" in case:  # two layers under the policy, as the model has them
            body = remat.wrap(lambda x, _: (x + routed(x, *others), None), case["remat"], scanned=True)
            y = jax.lax.scan(body, x, None, length=2)[0]
        else:
            y = routed(x, *others)
        return jnp.sum(jnp.square(y.astype(jnp.float32)))

    with jax.set_mesh(on):
        found, steps = {}, {"forward": loss, "both": jax.grad(loss, argnums=(0, 1))}
        for name in case.get("parts", steps):
            step = steps[name]
            program = jax.jit(step).lower(*arguments(moe, on)).compile()
            text, found[f"{name} bytes"] = program.as_text(), program.memory_analysis().temp_size_in_bytes
            found[name] = [[c.kind, c.dtype, c.shapes[0], c.name, c.bytes, c.devices] for c in collectives.of(text)]
    found["slices"] = [sorted({getattr(d, "slice_index", 0) for d in part.flat}) for part in on.devices]
    return found


if __name__ == "__main__":
    print(json.dumps([compiled(case) for case in json.loads(sys.argv[1])]))
