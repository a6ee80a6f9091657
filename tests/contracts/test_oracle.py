"""The oracle's gradients against its own finite differences: who guards the guard."""

import numpy as np
import oracle
import pytest


@pytest.mark.parametrize(
    "spec",
    [
        oracle.Spec(4, 2, "softmax_topk", factor=1.0),
        oracle.Spec(4, 3, "softmax_topk", renormalize=False, scale=2.5, factor=0.7, group_rows=2),
        oracle.Spec(4, 1, "switch", factor=1.0, window=3),
        oracle.Spec(4, 2, "gshard"),
    ],
    ids=lambda s: f"{s.router}-{s.k}",
)
def test_gradients_are_finite_differences(spec):
    rng = np.random.default_rng(0)
    arrays = [rng.normal(size=s) for s in ((2, 6, 3), (3, 4), (4, 3, 2, 2), (4, 2, 3))]
    rest = dict(uniform=rng.random((2, 6)), wiggle=rng.uniform(0.9, 1.1, (2, 6, 3)), dy=rng.normal(size=(2, 6, 3)))
    valid = rng.random((2, 6)) < 0.8

    def value(arrays):
        return oracle.layer(arrays[0], valid, *arrays[1:], spec, coefficients=(0.5, 0.25), **rest)

    gradients = value(arrays)[3]
    for i, gradient in enumerate(gradients):
        assert np.abs(gradient).max() > 0
        for _ in range(3):
            direction, epsilon = rng.normal(size=arrays[i].shape), 1e-6
            moved = [[*arrays[:i], arrays[i] + step * direction, *arrays[i + 1 :]] for step in (epsilon, -epsilon)]
            slope = (value(moved[0])[0] - value(moved[1])[0]) / (2 * epsilon)
            assert slope == pytest.approx((gradient * direction).sum(), rel=1e-6, abs=1e-8)
