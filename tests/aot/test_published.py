"""Training steps of published families compile for TPU on meshes that cut experts, heads and positions. Nothing runs on a TPU."""

import pytest
from aot import programs

pytestmark = programs.MARKS

CASES = {
    "gpt_oss": {"topology": "v5p:2x2x2", "mesh": {"fsdp": 2, "expert": 4}},
    "deepseek_v3": {"topology": "v6e:2x4", "mesh": {"expert": 2, "tensor": 2, "context": 2}},
    "llama4_text": {"topology": "v5p:2x2x2", "mesh": {"data": 2, "expert": 2, "context": 2}},
}


@pytest.fixture(scope="module")
def found():
    return programs.run("published.py", {name: case | {"family": name} for name, case in CASES.items()})


@pytest.mark.parametrize("name", CASES)
def test_a_training_step_compiles(found, name):
    """Experts are exchanged; temporaries are below 256 MiB a device."""
    assert found[name]["all_to_all"] > 0 and 0 < found[name]["temporary"] < 2**28
