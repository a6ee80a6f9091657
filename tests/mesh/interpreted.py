"""The sparse layer with interpreted TPU kernels on eight devices against the oracle, values and gradients; started by test_interpreted.py.

In a process of its own, because the interpreter holds a thread a device and XLA makes no more of them than NPROC says.
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import conftest  # noqa: F401  eight devices and checked annotations, as in every test
import jax

from moejax import config, mesh
from moejax.moe.inputs import Mode

CASES = {"gather": ({"data": 2, "expert": 4}, "hidden"), "ragged": ({"fsdp": 2, "expert": 2, "tensor": 2}, "hidden")}
"""A transport, its mesh, and what `tensor` cuts."""


def main():
    import cases
    import harness

    for transport, (sizes, layout) in CASES.items():
        moe = cases.configure("gshard", num_experts=8, transport=transport, tensor=layout, kernel="pallas_tpu")
        mode = Mode(True, 0.75)
        p = harness.problem(moe, rows=8, positions=4, seed=1)
        with jax.numpy_dtype_promotion("strict"):
            actual = harness.run(p, mesh.make(config.Mesh(**sizes), jax.devices()), moe, mode)
        harness.same(actual, harness.expected(p, moe, mode))
        assert (actual.sums["load"] > 0).sum() > 1
        print(f"{transport} on {sizes} is the oracle's", flush=True)


if __name__ == "__main__":
    main()
