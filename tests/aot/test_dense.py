"""Dense weights of a training step compiled for 64 chips: gathered in bf16, gradients summed in pieces in fp32. Nothing runs on a TPU."""

import pytest
from aot import programs

pytestmark = programs.MARKS

STORED = {"fsdp", "expert"}
ELSEWHERE = ("'embedding'", "'router'")
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
    """Sums that every device gets are smaller than a layer's least weight in bf16, but for pieces in fp32: of what is left of a gradient
    after its first scatter, along one axis, and over the batch shards that store the same."""
    least, sums = 2 * 1024 * 4 * 64, of_dense(found, "all-reduce")
    pieces = [(axes, dtype) for axes, dtype, size, _ in sums if size >= least]
    assert all(axes in ({"data"}, {"expert"}) and dtype == "f32" for axes, dtype in pieces)


def test_dense_weights_are_gathered_in_the_compute_type(found):
    """Axis by axis: once forward and once for the backward pass each, 2 bytes a number."""
    gathers = [g for g in of_dense(found, "all-gather") if g[0] & STORED and g[2] > 2**18]
    assert {dtype for _, dtype, _, _ in gathers} == {"bf16"}
    last = sum(size * times for axes, _, size, times in gathers if axes == {"fsdp"})
    assert last == 2 * 2 * sum(weights(found))


def test_their_gradients_are_scattered_once_in_fp32(found):
    """Each is scattered whole along one axis, 4 bytes a number, and the quarter that is left along the other. Of that quarter the compiler
    sums what is narrower than a tile."""
    scattered, summed = of_dense(found, "reduce-scatter"), of_dense(found, "all-reduce")
    assert {dtype for _, dtype, _, _ in scattered} == {"f32"}
    first, second, rest = (
        sum(size * times for axes, _, size, times in sent if axes == {axis} and size > 4)
        for sent, axis in ((scattered, "fsdp"), (scattered, "expert"), (summed, "expert"))
    )
    whole = 4 * sum(weights(found))
    assert first == whole and second + rest == whole // 4 and rest < second
