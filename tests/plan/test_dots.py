"""FLOPs of compiled matrix products against those worked out by hand: as dots, as convolutions, and in kernels that say what they cost."""

import jax
import jax.numpy as jnp
import pytest
from plan import compiled_text as text

from moejax.plan import dots


def test_a_product():
    """2 * rows * columns * contraction."""
    found = dots.of(text.compiled(jnp.matmul, text.array(16, 32), text.array(32, 24)))
    assert found.products == found.total == 2 * 16 * 32 * 24 and found.kernels == 0 and found.without_estimate == ()


def test_scores_of_attention():
    """Batch and heads are batch dimensions."""
    module = text.compiled(
        lambda q, k: jnp.einsum("btnh,bsnh->bnts", q, k), text.array(2, 16, 3, 32), text.array(2, 24, 3, 32)
    )
    assert dots.of(module).products == 2 * (2 * 3) * 16 * 24 * 32


def test_two_contracted_dimensions():
    module = text.compiled(
        lambda x, w: jnp.einsum("btnh,nhd->btd", x, w), text.array(2, 8, 3, 32), text.array(3, 32, 16)
    )
    assert dots.of(module).products == 2 * (2 * 8) * 16 * (3 * 32)


def test_loops_multiply():
    """Three turns of one product and fifteen of another, by their places in the program."""

    def inner(x, w):
        return jax.lax.scan(lambda c, _: (jnp.tanh(c @ w), None), x, None, length=5)[0]

    def outer(x, w):
        return jax.lax.scan(lambda c, _: (inner(c, w) + c @ w, None), x, None, length=3)[0]

    found = dots.of(text.compiled(outer, text.array(16, 32), text.array(32, 32)))
    each = 2 * 16 * 32 * 32
    assert found.products == 18 * each and sorted(found.by_scope.values()) == [3 * each, 15 * each]


def test_one_device_of_eight(mesh_of):
    """Rows over two and columns over four: an eighth of the product."""
    on = mesh_of(fsdp=2, expert=4)
    first, second = (name for name, size in on.shape.items() if size > 1)
    x = text.array(16, 32, sharding=jax.NamedSharding(on, jax.P(first, None)))
    w = text.array(32, 64, sharding=jax.NamedSharding(on, jax.P(None, second)))
    with jax.set_mesh(on):
        assert dots.of(text.compiled(jnp.matmul, x, w)).products == 2 * 16 * 32 * 64 // 8


def convolution(result, left, right, attributes):
    """FLOPs of one convolution of arrays of these shapes."""
    shape = lambda dims: f"bf16[{','.join(map(str, dims))}]"  # noqa: E731
    module = text.written(
        f"%a = {shape(left)}{{4,3,2,1,0}} parameter(0)",
        f"%b = {shape(right)} parameter(1)",
        f"ROOT %conv = {shape(result)}{{2,4,3,1,0:T(8,128)}} convolution(%a, %b), {attributes}",
    )
    return dots.of(module).products


B, T, S, KV, G, H = 2, 256, 256, 2, 2, 64


def test_batch_dimensions_as_dilated_windows():
    """BTNH,BSNH->BNTS: of a window as long as the batch, one place lies on an entry. Rows and heads are batch, so the FLOPs are those of
    a score for every pair and head."""
    found = convolution(
        (B, KV, T, G, S),
        (B, T, KV, G, H),
        (B, S, KV, H, 1),
        f"window={{size={B}x{KV}x1 lhs_dilate={B}x{KV}x1}}, dim_labels=0b12f_0o1i2->01b2f",
    )
    assert found == 2 * B * (KV * G) * T * S * H


def test_heads_as_a_padded_window():
    """btd,dhk->bthk: the window of four heads slides over one entry, and the rest of it is padding."""
    d, h, k = 256, 4, 64
    found = convolution(
        (B, T, h, k),
        (B, T, d, 1),
        (d, h, k, 1),
        f"window={{size=1x{h} pad=0_0x{h - 1}_{h - 1} rhs_reversal=0x1}}, dim_labels=0bf1_i1o0->0b1f",
    )
    assert found == 2 * B * T * d * h * k


def test_a_product_without_a_window():
    assert convolution((8, 24), (8, 32), (32, 24), "dim_labels=bf_io->bf") == 2 * 8 * 32 * 24


def test_a_stride():
    """Every second place of four; each window of two lies on two entries."""
    assert convolution(
        (3, 2, 7), (3, 4, 5), (2, 5, 7), "window={size=2 stride=2}, dim_labels=b0f_0io->b0f"
    ) == 2 * 3 * 7 * 5 * (2 * 2)


def test_holes_in_the_window():
    """Entries 0 and 2 of four, then 1 and 3."""
    assert convolution(
        (3, 2, 7), (3, 4, 5), (2, 5, 7), "window={size=2 rhs_dilate=2}, dim_labels=b0f_0io->b0f"
    ) == 2 * 3 * 7 * 5 * (2 * 2)


def test_padding_does_not_count():
    """A window of three over four entries with one of padding on each side: 2, 3, 3 and 2 entries."""
    assert (
        convolution((3, 4, 7), (3, 4, 5), (3, 5, 7), "window={size=3 pad=1_1}, dim_labels=b0f_0io->b0f")
        == 2 * 3 * 7 * 5 * 10
    )
    assert (
        convolution((3, 1, 7), (3, 4, 5), (2, 5, 7), "window={size=2 pad=-1_-1}, dim_labels=b0f_0io->b0f")
        == 2 * 3 * 7 * 5 * 2
    )


@pytest.mark.parametrize(
    "option, left, right, result",
    [
        ("feature_group_count=3", (6, 8, 12), (3, 4, 21), (6, 6, 21)),
        ("batch_group_count=4", (8, 8, 12), (3, 12, 20), (2, 6, 20)),
    ],
)
def test_groups(option, left, right, result):
    """Of the features: weights have the features of one group. Of the batch: the result has the rows of one. Shapes are those of jax."""
    name, _, number = option.partition("=")
    numbers = {"dimension_numbers": ("NWC", "WIO", "NWC"), name: int(number)}
    made = jax.eval_shape(
        lambda a, b: jax.lax.conv_general_dilated(a, b, (1,), "VALID", **numbers), text.array(*left), text.array(*right)
    )
    assert made.shape == result
    found = convolution(result, left, right, f"window={{size=3}}, dim_labels=b0f_0io->b0f, {option}")
    assert found == 2 * result[0] * result[1] * result[2] * right[1] * 3


CALL = 'custom_call_target="tpu_custom_call"'


def test_kernels_by_their_estimates():
    """One that says what it costs, one in a loop that says nothing, and one of the compiler that is no kernel."""
    module = text.written(
        "%a = bf16[8,8] parameter(0)",
        f'%one = bf16[8,8] custom-call(%a), {CALL}, metadata={{op_name="jit(f)/experts/gmm"}}, '
        'backend_config={"custom_call_config":{"cost_estimate":{"flops":"4096","bytes_accessed":"9"}}}',
        f'%two = bf16[8,8] custom-call(%one), {CALL}, metadata={{op_name="jit(f)/silent"}}, backend_config={{"custom_call_config":{{}}}}',
        'ROOT %three = bf16[8,8] custom-call(%two), custom_call_target="Sharding"',
    )
    found = dots.of(module)
    assert found.kernels == found.total == 4096 and found.products == 0
    assert found.without_estimate == ("jit(f)/silent",)
    assert found.by_scope == {"jit(f)/experts/gmm": 4096, "jit(f)/silent": 0}
    assert dots.kernels(module) == {"jit(f)/experts/gmm": 1, "jit(f)/silent": 1}


def test_a_kernel_whose_estimate_takes_several_lines():
    """As the compiler writes one inside a fusion; what comes after it is still of the fusion."""
    note = 'backend_config={"custom_call_config": {"body": "TUzv", "cost_estimate": {\n"bytes_accessed":9,\n"flops":4096\n}, "version": 1}}'
    fused = f"""%fused (a: bf16[8,8]) -> bf16[8,8] {{
  %a = bf16[8,8] parameter(0)
  %kernel = bf16[8,8] custom-call(%a), {CALL}, metadata={{op_name="gmm"}}, {note}
  ROOT %dot = bf16[8,8] dot(%kernel, %a), lhs_contracting_dims={{1}}, rhs_contracting_dims={{0}}
}}
"""
    found = dots.of(
        text.written("%x = bf16[8,8] parameter(0)", "ROOT %y = bf16[8,8] fusion(%x), calls=%fused", others=fused)
    )
    assert (found.kernels, found.products, found.without_estimate) == (4096, 2 * 8 * 8 * 8, ())


def test_a_librarys_product_is_refused():
    """It would be left out in silence."""
    module = text.written(
        "%a = f32[8,8] parameter(0)", 'ROOT %dot = f32[8,8] custom-call(%a), custom_call_target="__onednn$matmul"'
    )
    with pytest.raises(ValueError, match="not counted"):
        dots.of(module)
