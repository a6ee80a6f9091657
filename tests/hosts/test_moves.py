"""A run that moves: from four processes to one, to another mesh, and to four again (B23)."""

import json

import pytest
from hosts import faults
from train import small

FLAGS = {
    "train.steps": 16,
    "checkpoint.every": 4,
    "model.moe.num_experts": 8,
    "model.kv_heads": 2,
    "train.epsilon": 1e-2,
    "data.batch": 8,
}
HOPS = [
    (4, 2, {"mesh.fsdp": 1, "mesh.expert": 8, "faults.raise_at": 10}),
    (1, 8, {"mesh.fsdp": 2, "mesh.expert": 4, "faults.raise_at": 14}),
    (4, 2, {"mesh.fsdp": 1, "mesh.expert": 1, "mesh.data": 8}),
]
"""Processes, devices of each, mesh and where it ends."""


@pytest.mark.slow
def test_b23_processes_and_meshes(tmp_path):
    """Each hop restores what the hop before saved: its digests are checked, moments and biases among them. The batches go on where they
    were, and the losses are those of one device to 1e-5."""
    text = small.prepared(tmp_path / "text")
    for hop, (number, devices, options) in enumerate(HOPS):
        found = faults.run(text, tmp_path / "moved", number=number, devices=devices, **FLAGS | options)
        codes = {code for code, *_ in found}
        assert codes == ({0} if hop == len(HOPS) - 1 else {1}), found
        assert ("resumed at step" in found[0][1]) == (hop > 0)
    first, second = (line["step"] for line in faults.events(tmp_path / "moved") if line["event"] == "resumed")
    assert first in (4, 8) and second in (8, 12), "the save before the last is complete, the last may be"
    assert not [line for line in faults.events(tmp_path / "moved") if line["event"] == "damaged checkpoint"]
    alone = faults.run(text, tmp_path / "alone", number=1, devices=1, **FLAGS | {"mesh.fsdp": 1, "mesh.expert": 1})
    assert alone[0][0] == 0, alone
    moved, still = (
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("moved", "alone")
    )
    assert [line["step"] for line in moved] == [line["step"] for line in still]
    for a, b in zip(moved, still, strict=True):
        shared = a.keys() & b.keys() - {"data/padding_rows"}
        assert {k: a[k] for k in shared} == pytest.approx({k: b[k] for k in shared}, rel=1e-5, abs=1e-6)
