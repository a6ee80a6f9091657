"""Dense weights of a training step compiled for 64 chips: gathered in bf16, gradients summed in pieces in fp32. Nothing runs on a TPU."""

import pytest
from aot import programs

pytestmark = programs.MARKS

STORED = {"fsdp", "expert"}
ELSEWHERE = ("embedding", "router")
"""Looked up where its columns lie; and small, in fp32, handed to the sparse layer whole."""


@pytest.fixture(scope="module")
def found():
    case = {"topology": "v5p:4x4x4", "mesh": {"data": 4, "fsdp": 4, "expert": 4}}
    return programs.run("dense.py", {"": case})[""]


def weights(found):
    return [n for path, n in found["dense"].items() if not any(name in path for name in ELSEWHERE)]


def of_dense(found, kind):
    return [
        (set(axes), dtype, size, times)
        for k, axes, dtype, size, times, scope in found["sent"]
        if k == kind and "/experts/" not in scope
    ]


def test_no_gradient_is_summed_whole(found):
    """Over the axes that weights are stored over no device gets a sum as large as a layer's least weight in bf16; over the others, pieces
    in fp32."""
    least, sums = 2 * 1024 * 4 * 64, of_dense(found, "all-reduce")
    assert all(size < least for axes, _, size, _ in sums if axes & STORED)
    assert all(dtype == "f32" for axes, dtype, size, _ in sums if axes == {"data"})


def test_dense_weights_are_gathered_in_the_compute_type(found):
    """Axis by axis: once forward and once for the backward pass each, 2 bytes a number."""
    gathers = [g for g in of_dense(found, "all-gather") if g[0] & STORED and g[2] > 2**18]
    assert {dtype for _, dtype, _, _ in gathers} == {"bf16"}
    last = sum(size * times for axes, _, size, times in gathers if axes == {"fsdp"})
    assert last == 2 * 2 * sum(weights(found))


def test_their_gradients_are_scattered_once_in_fp32(found):
    """Each is scattered whole along one axis, and what is left along the other: 4 bytes a number, and a quarter of that."""
    scattered = of_dense(found, "reduce-scatter")
    assert {dtype for _, dtype, _, _ in scattered} == {"f32"}
    for axis, parts in (("fsdp", 1), ("expert", 4)):
        assert (
            sum(size * times for axes, _, size, times in scattered if axes == {axis})
            == 4 * sum(weights(found)) // parts
        )
