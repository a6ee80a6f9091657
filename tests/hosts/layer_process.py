"""One of several processes of eight devices in all, started by test_layer_processes.py: the layer on them against the oracle.

layer_process.py COORDINATOR PROCESSES PROCESS
"""

import os
import pathlib
import sys

os.environ["JAX_PLATFORMS"] = "cpu"
sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import jax

from moejax import config
from moejax.moe.inputs import Mode
from moejax.moe.transport import TRANSPORTS

DEVICES = 8
MESHES = [
    ({"expert": 8}, "hidden"),
    ({"fsdp": 2, "expert": 2, "context": 2}, "hidden"),
    ({"expert": 2, "tensor": 2, "context": 2}, "experts"),
]
"""Experts over all processes; positions inside of one; rows and positions that several processes share."""


def cases_of_transports():
    """Every transport on one mesh, and the exchange on all."""
    for i, transport in enumerate(TRANSPORTS):
        yield transport, *MESHES[i % len(MESHES)]
    yield "ragged", *MESHES[1]


def main(coordinator, processes, process):
    jax.config.update("jax_num_cpu_devices", DEVICES // processes)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(coordinator, processes, process)
    import cases
    import harness

    from moejax import mesh

    demanding = {"num_experts": 16, "hidden_classes": (12, 20), "zero_experts": ("identity",), "sign_bias": 0.001}
    for transport, sizes, layout in cases_of_transports():
        moe = cases.configure("gshard", **demanding, transport=transport, tensor=layout)
        p, mode = harness.problem(moe, seed=7, rows=8, positions=8), Mode(True, 0.75)
        actual = harness.run(p, mesh.make(config.Mesh(**sizes)), moe, mode)
        harness.same(actual, harness.expected(p, moe, mode))
        print("as the oracle:", transport, sizes, flush=True)
    print(f"process {process} of {processes} is done", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
