"""Dense weights gathered where they are used, and tokens looked up, on every kind of mesh: values and gradients as on one device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moejax import sharding
from moejax.models import lookup

MESHES = [{}, {"fsdp": 8}, {"expert": 4}, {"data": 2, "fsdp": 2, "expert": 2}, {"fsdp": 2, "tensor": 2, "context": 2}]
B, T, D, F, V = 8, 4, 16, 6, 11
WEIGHTS = {
    "first": (("storage", "heads"), (D, F), "btd,df->btf"),
    "last, narrow": (("heads", "storage"), (F, D), "btd,fd->btf"),
    "last, of whole tiles": (("heads", "storage"), (F, 2048), "btd,fd->btf"),
    "not stored in pieces": ((None, "heads"), (D, F), "btd,df->btf"),
}


def numbers(*shape):
    return np.random.default_rng(0).integers(-4, 5, shape).astype(np.float32)


def activations(width):
    return jax.device_put(numbers(B, T, width), sharding.spec("batch", "position", None))


@pytest.mark.parametrize("sizes", MESHES, ids=str)
@pytest.mark.parametrize("name", WEIGHTS)
def test_a_product_and_its_gradient(mesh_of, sizes, name):
    """Whole numbers, so sums are exact in any order: equal to NumPy's, and the gradient lies where the weight is stored."""
    dims, shape, product = WEIGHTS[name]
    with jax.set_mesh(mesh_of(**sizes)):
        weight = nnx.Param(jax.device_put(numbers(*shape), sharding.spec(*dims)), dims=dims)
        x = activations(max(shape[1] if "fd" in product else D, D))

        def loss(value, x):
            whole = sharding.gather(nnx.Param(value, dims=dims))
            y = jnp.einsum(product, x, whole, out_sharding=sharding.spec("batch", "position", "heads"))
            return jnp.sum(jnp.square(y)), y

        (_, y), slope = jax.jit(jax.value_and_grad(loss, has_aux=True))(weight[...], x)
        assert jax.typeof(slope).sharding == jax.typeof(weight[...]).sharding
    expected = np.einsum(product, numbers(*x.shape), numbers(*shape))
    np.testing.assert_array_equal(np.asarray(y), expected)
    back = product.replace("->", ",").split(",")
    np.testing.assert_array_equal(
        np.asarray(slope), np.einsum(f"{back[0]},{back[2]}->{back[1]}", numbers(*x.shape), 2 * expected)
    )


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_tokens_and_the_gradient_of_their_table(mesh_of, sizes):
    """The same of a lookup: tokens that occur often add up, others have zeros."""
    dims, tokens = (None, "storage"), np.arange(B * T, dtype=np.int32).reshape(B, T) % (V - 1)
    with jax.set_mesh(mesh_of(**sizes)):
        table = jax.device_put(numbers(V, D), sharding.spec(*dims))
        given = jax.device_put(tokens, sharding.spec("batch", "position"))

        def loss(table, tokens):
            y = lookup.embedded(nnx.Param(table, dims=dims), tokens, jnp.bfloat16)
            return jnp.sum(jnp.square(y.astype(jnp.float32))), y

        (_, y), slope = jax.jit(jax.value_and_grad(loss, has_aux=True))(table, given)
        assert jax.typeof(slope).sharding == jax.typeof(table).sharding
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(y, np.float32), numbers(V, D)[tokens])
    wanted = np.zeros((V, D), np.float32)
    np.add.at(wanted, tokens, 2 * numbers(V, D)[tokens])
    np.testing.assert_array_equal(np.asarray(slope), wanted)
