"""The fused first half of an expert, its gradient, and eight-bit weights, as in test_pallas_tpu."""

import harness
import jax.numpy as jnp
import numpy as np
import pytest
from contracts.on_tpu import (
    ONE,
    SIZES,
    SQUARE,
    TWO,
    K,
    M,
    N,
    close_rows,
    drawn,
    f64,
    i32,
    jitted,
    options,
    rows_times,
)

from moejax.errors import ConfigError
from moejax.kernels.activations import Activation
from moejax.kernels.grouped_matmul import pallas_tpu
from moejax.kernels.quantized import int8

pytestmark = pytest.mark.usefixtures("strict_dtypes")


# ---- activations --------------------------------------------------------------------------------------------------

SWIGLU, GPT_OSS, RELU2 = Activation(), Activation("gpt_oss", 0.7), Activation("relu2")


def value(activation, gate, up):
    """The activation in float64, written again."""
    if activation == RELU2:
        return np.maximum(up, 0) ** 2
    if activation == SWIGLU:
        return gate / (1 + np.exp(-gate)) * up
    gate, up = np.minimum(gate, 0.7), np.clip(up, -0.7, 0.7)
    return gate / (1 + np.exp(-1.702 * gate)) * (up + 1)


def slopes(activation, gate, up, step=1e-6):
    """Of the activation in gate and up, by differences."""
    return [
        (value(activation, gate + a, up + b) - value(activation, gate - a, up - b)) / (2 * step)
        for a, b in ((step, 0), (0, step))
    ]


@pytest.mark.parametrize(
    ("activation", "chip"), [(SWIGLU, TWO), (GPT_OSS, ONE), (RELU2, ONE)], ids=["swiglu", "gpt_oss", "relu2"]
)
def test_glu(activation, chip):
    x, gate, up, gate_bias, up_bias = drawn("float32", (M, K), (3, K, N), (3, K, N), (3, N), (3, N))
    sizes = SIZES[3]["all"]
    biases = {"gate_bias": gate_bias if activation.gated else None, "up_bias": up_bias}
    a, h_gate, h_up = jitted("glu", chip, activation=activation)(
        x, gate if activation.gated else None, up, i32(sizes), i32(0), **biases
    )
    wanted = [rows_times(x, w, sizes) + np.repeat(f64(b), sizes, 0) for w, b in ((gate, gate_bias), (up, up_bias))]
    close_rows(h_up, wanted[1], sizes)
    close_rows(a, value(activation, *wanted), sizes)
    if activation.gated:
        close_rows(h_gate, wanted[0], sizes)
    else:
        assert h_gate is None


def test_glu_activates_what_it_rounded():
    """In bf16 the activation is that of the rounded h, to the bit: the backward pass will see no other."""
    x, gate, up = drawn("bfloat16", (M, K), (1, K, N), (1, K, N))
    a, h_gate, h_up = jitted("glu", activation=SWIGLU)(x, gate, up, i32([M]), i32(0))
    harness.close(f64(a), f64(SWIGLU.value(h_gate, h_up).astype(jnp.bfloat16)), 2**-8)


@pytest.mark.parametrize(
    ("activation", "weighted", "chip"),
    [(SWIGLU, True, TWO), (GPT_OSS, True, ONE), (RELU2, False, ONE)],
    ids=["swiglu", "gpt_oss", "relu2"],
)
def test_dglu(activation, weighted, chip):
    """Gradients through the activation and of the row's factor, without the output; NaN in rows of no group stays there."""
    rows, width, hidden, sizes, start = 530, 6, 200, [150, 0, 200], 41
    dy, down, h_gate, h_up, factor = drawn(
        "float32", (rows, width), (3, hidden, width), (rows, hidden), (rows, hidden), (rows,)
    )
    h_gate, h_up = (jnp.rint(h * 16) / 16 for h in (h_gate, h_up))  # differences are not taken across the limit's kink
    live = slice(start, start + sum(sizes))
    dy, h_up, factor = (a.at[:start].set(jnp.nan).at[live.stop :].set(jnp.nan) for a in (dy, h_up, factor))
    dh_gate, dh_up, a, d_factor = jitted("dglu", chip, SQUARE, activation=activation)(
        dy,
        down,
        h_gate if activation.gated else None,
        h_up,
        i32(sizes),
        i32(start),
        row_weight=factor if weighted else None,
    )
    da, gate, up = rows_times(dy, f64(down).swapaxes(1, 2), sizes, start)[live], f64(h_gate)[live], f64(h_up)[live]
    scale = f64(factor)[live, None] if weighted else 1.0
    by_gate, by_up = slopes(activation, gate, up)
    harness.close(f64(dh_up)[live], da * scale * by_up)
    harness.close(f64(a)[live], scale * value(activation, gate, up))
    if activation.gated:
        harness.close(f64(dh_gate)[live], da * scale * by_gate)
    else:
        assert dh_gate is None
    if weighted:
        harness.close(f64(d_factor)[live], (da * value(activation, gate, up)).sum(1))
    else:
        assert d_factor is None


# ---- eight bits ---------------------------------------------------------------------------------------------------


def test_eight_bit_weights():
    """The same as with the weights that the eight bits stand for."""
    x, w, up = drawn("bfloat16", (M, K), (3, K, N), (3, K, N))
    sizes = SIZES[3]["all"]
    small, small_up = int8(w), int8(up)
    y = jitted("matmul", out_dtype=jnp.float32)((x,), (small,), i32(sizes), i32(0))
    meant, meant_up = (f64(q.values) * f64(q.scale) for q in (small, small_up))
    close_rows(y, rows_times(x, meant, sizes), sizes)
    assert np.abs(meant - f64(w)).max() <= np.abs(f64(w)).max() / 254 * 1.001
    a, h_gate, h_up = jitted("glu", activation=SWIGLU)(x, small, small_up, i32(sizes), i32(0))
    gate, up = rows_times(x, meant, sizes), rows_times(x, meant_up, sizes)
    close_rows(h_gate, gate, sizes, "bfloat16")
    close_rows(a, value(SWIGLU, gate, up), sizes, "bfloat16")


def test_eight_bit_weights_are_not_transposed():
    x, w = drawn("bfloat16", (M, N), (3, K, N))
    with pytest.raises(ConfigError, match="eight-bit weights"):
        pallas_tpu.matmul(
            (x,), (int8(w),), i32([M, 0, 0]), i32(0), transpose_w=True, out_dtype=jnp.float32, **options(ONE)
        )
