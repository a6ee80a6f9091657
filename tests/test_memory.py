"""Freed memory is kept where the host is the device: allocated again it costs no page fault."""

import platform
import resource
import subprocess
import sys

import pytest

CODE = """
import resource, sys
import numpy as np
from moejax import memory
asked = sys.argv[1] == "keep" and memory.keep_freed()
np.ones(2**23)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    np.ones(2**23)
print(asked, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is told")
def test_allocating_again_faults_no_page():
    """64 MB five times: every page of each without, almost none with."""

    def faults(how):
        done = subprocess.run([sys.executable, "-c", CODE, how], capture_output=True, text=True, check=True)
        asked, number = done.stdout.split()
        return asked == "True", int(number)

    pages = 2**26 // resource.getpagesize()
    asked, kept = faults("keep")
    _, freed = faults("leave")
    assert asked and kept < pages // 100
    assert freed > pages // 100
