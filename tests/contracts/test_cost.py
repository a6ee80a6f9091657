"""What watching costs by the compiler's own count: every statistic of a layer, against the same layer without any."""

import functools

import harness
import jax
import jax.numpy as jnp
import pytest

from moejax import config, sharding
from moejax.kernels.grouped_mlp import Weights
from moejax.moe import balancers, inputs, layer

pytestmark = [pytest.mark.usefixtures("strict_dtypes"), pytest.mark.slow]

B, T, D, E, F, K = 8, 2048, 2048, 256, 768, 8
"""16k tokens of width 2048, 256 experts, 8 a token: shapes alone, nothing is allocated."""


def arguments(mesh):
    def shape(dims, dtype, *names):
        return jax.ShapeDtypeStruct(dims, dtype, sharding=jax.NamedSharding(mesh, sharding.spec(*names)))

    rows = functools.partial(shape, (B, T))
    tokens = inputs.Tokens(
        rows(bool, "batch", None), rows(jnp.int32, "batch", None), shape((B,), jnp.int32, "batch"),
        rows(jnp.int32, "batch", None),
    )  # fmt: skip
    weights = Weights(
        shape((E, D, F), jnp.float32, "expert", "expert_storage", "expert_hidden"),
        shape((E, F, D), jnp.float32, "expert", "expert_hidden_storage", None),
        shape((E, D, F), jnp.float32, "expert", "expert_storage", "expert_hidden"),
    )
    parameters = layer.Parameters({"logits": shape((D, E), jnp.float32)}, (weights,))
    vectors = functools.partial(shape, (B, T, D))
    return parameters, vectors(jnp.bfloat16, "batch", None, None), tokens, vectors(jnp.float32, "batch", None, None)


def cost(mesh, moe, watched):
    """(FLOPs, bytes) of the layer with its gradients, returning its sums or, without them, computing only what losses need."""

    def value(parameters, x, tokens, dy):
        moment = inputs.Moment(jax.random.key(0), jnp.int32(0), jnp.int32(0))
        result = layer.sparse_layer(
            x, None, tokens, parameters, {}, moment, moe, inputs.Mode(True, moe.capacity_factor)
        )
        sums = jax.tree.map(lambda s: jnp.sum(s, axis=0, dtype=s.dtype)[None], result.sums)
        aux = sum(jnp.sum(w * v) for v, w in balancers.losses(sums, {}, moe).values())
        return jnp.sum(result.routed.astype(jnp.float32) * dy) + aux, sums

    def step(*given):
        (total, sums), slope = jax.value_and_grad(value, argnums=(0, 1), has_aux=True)(*given)
        return (total, slope, sums) if watched else (total, slope)

    with jax.set_mesh(mesh):
        counted = harness.jit(step).lower(*arguments(mesh)).compile().cost_analysis()
    return counted["flops"], counted["bytes accessed"]


def test_statistics_cost_less_than_two_percent(mesh_of):
    """All sums and the two losses that read them, against no sums and no losses at all."""
    moe = config.MoE(num_experts=E, top_k=K, hidden=F, capacity_factor=1.25, transport="scatter")
    bare = config.MoE(**{**vars(moe), "load_balance": 0.0, "router_z": 0.0})
    with_all, without = cost(mesh_of(), moe, True), cost(mesh_of(), bare, False)
    for name, full, less in zip(("FLOPs", "bytes"), with_all, without, strict=True):
        assert full > less, f"{name}: the statistics are not in the program"
        assert full / less - 1 < 0.02, f"{name}: {full:.4g} against {less:.4g}"
        print(f"{name}: {full / less - 1:.3%} more")
