"""The TPU kernels compiled for TPU, on four or eight chips under check_vma: memory, code and cores. Nothing runs on a TPU.

A few of what `scripts/bench.py tpu_kernels` compiles in full.
"""

import json
import os
import pathlib
from importlib import metadata

import pytest
from aot import programs

from moejax.bench import tpu_kernels
from moejax.bench.shapes import SHAPES

pytestmark = programs.MARKS

ROOT = pathlib.Path(__file__).parents[2]
KEY, SAID = ("chip", "shape", "function", "whose"), ("matrix_unit", "spills")
ASKED = {
    "v5e": [("qwen3_30b", "glu")],
    "tpu7x": [("qwen3_30b", "dx")],
    "v5p": [("qwen3_30b", "down"), ("qwen3_30b", "dx"), ("qwen3_30b", "dglu"), ("qwen3_30b", "dw down")],
    "v6e": [("qwen3_30b", "glu"), ("gpt_oss_120b", "dw up")],
}
MiB = 2**20


@pytest.fixture(scope="module", params=ASKED)
def rows(request):
    """What the compiler says of each of a chip's kernels."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(programs.LIBTPU)]))
        return tpu_kernels.compiled(request.param, [[*case, "ours"] for case in ASKED[request.param]])


def test_kernels_compile_without_copies(rows):
    """Every kernel fits its core's memory; what it keeps beside its arguments is the work list and sums of rows, no copy of an array."""
    for row in rows:
        assert "error" not in row, row
        shape = SHAPES[row["shape"]]
        assert row["temp_bytes"] < MiB + 4 * 16 * shape.rows, row
        assert row["code_bytes"] <= MiB, row


def test_the_table_of_the_docs_is_what_the_compiler_says(rows):
    """Filled slots and spills as recorded in benchmarks/, by the compiler they were recorded with."""
    table = json.loads((ROOT / "benchmarks" / "kernels_tpu_compiled.json").read_text())
    if metadata.version("jax") != table["versions"]["jax"]:
        pytest.skip("another compiler, another schedule")
    recorded = {tuple(r[key] for key in KEY): r for r in table["rows"]}
    known = [(row, recorded[at]) for row in rows if (at := tuple(row[key] for key in KEY)) in recorded]
    for row, wanted in known:
        assert {name: row[name] for name in SAID} == pytest.approx({name: wanted[name] for name in SAID}, abs=0.005)


def test_both_cores_of_a_v5p_work(rows):
    """The kernel's grid is cut by the number of the core that it runs on."""
    for row in rows:
        assert row["by_core"] == (row["chip"] == "v5p"), row
