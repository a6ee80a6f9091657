"""Exchanges run under matrix products in programs compiled for TPU: the compiler starts and ends them apart. Nothing runs on a TPU."""

import jax
import pytest
from aot import programs

pytestmark = programs.MARKS

SCATTER = {"transport": "scatter", "capacity_factor": 1.25}
RAGGED = {"transport": "ragged", "receive_buffer": 8.0, "chunks": 2}
EIGHT = {"topology": "v5p:2x2x2", "mesh": {"expert": 8}}
APART = jax.__version_info__ >= (0, 11)
"""Whether the compiler starts a ragged exchange apart from its end."""
CASES = {
    "chunks": EIGHT | {"moe": SCATTER | {"chunks": 2}},
    "chunks on v6e": {"topology": "v6e:2x4", "mesh": {"expert": 8}, "moe": SCATTER | {"chunks": 2}},
    "one": EIGHT | {"moe": SCATTER},
    "shared": EIGHT | {"moe": SCATTER | {"shared_hidden": 2048}},
    "ragged": EIGHT | {"moe": RAGGED},
    "ragged, padded": EIGHT | {"moe": RAGGED | {"exchange": "padded"}},
}


@pytest.fixture(scope="module")
def found():
    return programs.run("overlapped.py", {name: case for name, case in CASES.items() if name != "ragged" or APART})


def under(spans, stage, backward):
    """Of each exchange of a stage, forward or backward: the stages whose products run under it."""
    exchanges = [s for s in spans if s[0].endswith("all-to-all") and f"/{stage}/" in s[1]]
    return [
        {"experts" if "/experts/" in p else "shared" if "shared" in p else "other" for p in products}
        for _, name, products in exchanges
        if ("transpose" in name) == backward
    ]


@pytest.mark.parametrize("name", ["chunks", "chunks on v6e"])
def test_chunks_hide_exchanges_under_experts(found, name):
    """Two chunks: two crossings each way, forward and backward, all apart; of each pair that comes home one runs under the other
    chunk's experts, and so do those of the backward pass."""
    spans = found[name]
    assert [len(under(spans, s, b)) for s in ("dispatch", "combine") for b in (False, True)] == [2, 2, 2, 2]
    assert any("experts" in u for u in under(spans, "combine", False))
    assert any("experts" in u for u in under(spans, "dispatch", True))


def test_without_chunks_nothing_runs_under_the_exchange(found):
    """One chunk's experts wait for its own exchange: what the chunks are for."""
    assert not any("experts" in u for stage in ("dispatch", "combine") for u in under(found["one"], stage, False))


def test_shared_experts_hide_the_exchange(found):
    """One chunk: the shared expert runs under an exchange, forward and backward."""
    for backward in (False, True):
        assert any("shared" in u for s in ("dispatch", "combine") for u in under(found["shared"], s, backward))


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            "ragged",
            marks=pytest.mark.skipif(not APART, reason="its compiler never starts a ragged exchange apart"),
        ),
        "ragged, padded",
    ],
)
def test_chunks_hide_exchanges_of_rows(found, name):
    """Rows by the ragged exchange and by the padded one: some cross under the experts of the other chunk."""
    assert any("experts" in u for u in under(found[name], "experts", False))
