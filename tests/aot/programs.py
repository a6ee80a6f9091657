"""Starts a process that compiles for TPU, which this one must not: with the compiler in its path it would look for a TPU."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

LIBTPU = pathlib.Path(sys.prefix) / "tpu"
"""Where `make tpu` puts the compiler, apart from the other packages: with it in their path every command would look for a TPU."""

MARKS = [
    pytest.mark.slow,
    pytest.mark.skipif(not LIBTPU.is_dir(), reason="no TPU compiler; make tpu installs it"),
]


def run(script, cases):
    """What a script of this folder prints as JSON for a table of cases, by their names."""
    here = pathlib.Path(__file__).parent
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(here.parents[1]), str(LIBTPU)])}
    command = [sys.executable, str(here / script), json.dumps(list(cases.values()))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(zip(cases, json.loads(done.stdout.splitlines()[-1]), strict=True))
