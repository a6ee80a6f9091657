"""The TPU kernels compiled for TPU, on four or eight chips under check_vma: memory, code and cores. Nothing runs on a TPU.

A few of what `scripts/bench.py tpu_kernels` compiles in full.
"""

import os
import pathlib

import pytest
from aot import programs

from moejax.bench import tpu_kernels
from moejax.bench.shapes import SHAPES

pytestmark = programs.MARKS

ASKED = {
    "v5p": [("qwen3_30b", "down"), ("qwen3_30b", "dx"), ("qwen3_30b", "dglu"), ("qwen3_30b", "dw down")],
    "v6e": [("qwen3_30b", "glu"), ("gpt_oss_120b", "dw up")],
}
MiB = 2**20


@pytest.fixture(scope="module", params=ASKED)
def rows(request):
    """What the compiler says of each of a chip's kernels."""
    here = pathlib.Path(__file__).parents[2]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(here), str(programs.LIBTPU)]))
        return tpu_kernels.compiled(request.param, [[*case, "ours"] for case in ASKED[request.param]])


def test_kernels_compile_without_copies(rows):
    """Every kernel fits its core's memory; what it keeps beside its arguments is the work list and sums of rows, no copy of an array."""
    for row in rows:
        assert "error" not in row, row
        shape = SHAPES[row["shape"]]
        assert row["temp_bytes"] < MiB + 4 * 16 * shape.rows, row
        assert row["code_bytes"] <= MiB, row


def test_the_matrix_unit_is_busy_in_the_innermost_loop(rows):
    """By the compiler's schedule; what it stores because registers ran out takes few of the slots of stores."""
    for row in rows:
        assert row["matrix_unit"] > 0.5 and row["spills"] < 0.2, row


def test_both_cores_of_a_v5p_work(rows):
    """The kernel's grid is cut by the number of the core that it runs on."""
    for row in rows:
        assert row["by_core"] == (row["chip"] == "v5p"), row
