"""The sparse layer over two and four real processes (B1, B13): values, sums and gradients of every transport equal the oracle's."""

import pathlib
import socket
import subprocess
import sys

import pytest
from train import small

WORKER = pathlib.Path(__file__).with_name("layer_process.py")


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_b01_b13_processes_change_nothing(processes):
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    pipe = subprocess.PIPE
    started = [
        subprocess.Popen(
            [sys.executable, str(WORKER), f"localhost:{port}", str(processes), str(i)],
            stdout=pipe,
            stderr=pipe,
            text=True,
        )
        for i in range(processes)
    ]
    for i, process in enumerate(started):
        code, out, err = small.finish(process, 300)
        assert code == 0 and f"process {i} of {processes} is done" in out, (out[-2000:], err[-4000:])
