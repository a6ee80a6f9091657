"""Sparse layers compiled for TPU topologies: which collectives start and end apart, and what runs between. Run by test_overlap.

python overlapped.py '[{"topology": "v5p:2x2x2", "mesh": {"expert": 8}, "moe": {"chunks": 2}}]'
"""

import json
import sys

import compiled  # first: it says what JAX may touch
import jax
import jax.numpy as jnp
from flax import nnx

from moejax import compat, config, sharding
from moejax.bench import collectives
from moejax.layers.context import Context
from moejax.layers.feed_forward import Side, Sparse
from moejax.moe import inputs, noise

D, F, T, EACH = 1024, 1024, 1024, 2
"""Width, hidden width, positions, rows of a batch shard: an exchange has to be worth hiding."""


def spans(case):
    """[kind, operation, matrix products under it] of every collective that starts and ends apart, forward and backward."""
    on, moe = compiled.mesh_of(case), config.MoE(hidden=F, **case["moe"])
    model = config.Model(width=D, moe=moe)

    def of(shape, dtype, *names):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=jax.NamedSharding(on, sharding.spec(*names)))

    with jax.set_mesh(on):
        graph, variables = nnx.split(jax.eval_shape(lambda: Sparse(model, rngs=nnx.Rngs(0))))
        held = jax.tree.map(
            lambda v: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=sharding.of_parameter(v, on)),
            variables,
            is_leaf=lambda v: isinstance(v, nnx.Param),
        )
        rows = EACH * sharding.shards(on, "batch")
        flags, ids = of((rows, T), jnp.bool_, "batch", None), of((rows, T), jnp.int32, "batch", None)
        tokens = inputs.Tokens(flags, ids, of((rows,), jnp.int32, "batch"), ids)

        def loss(parameters, x, tokens, step):
            context = Context({}, tokens, noise.step_key(0, step), step)
            mode = inputs.Mode(True, moe.capacity_factor)
            y, _ = nnx.merge(graph, parameters)(x, context, jnp.int32(0), mode, Side({}, None))
            return jnp.sum(jnp.square(y.astype(jnp.float32)))

        given = held, of((rows, T, D), jnp.bfloat16, "batch", "position", None), tokens, of((), jnp.int32)
        program = jax.jit(jax.grad(loss, argnums=(0, 1)), **compat.overlapping("tpu")).lower(*given).compile()
    return collectives.spans(program.as_text())


if __name__ == "__main__":
    print(json.dumps([spans(case) for case in json.loads(sys.argv[1])]))
