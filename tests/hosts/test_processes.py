"""Two and four real processes of eight devices in all train as one process does (B1, B16, B23)."""

import json
import socket

import numpy as np
import pytest
from train import small

OPTIONS = {
    "train.steps": 3, "train.log_every": 1, "train.eval_every": 2, "train.eval_rows": 8, "train.routing_every": 3,
    "checkpoint.every": 2, "model.kv_heads": 2, "model.moe.router": "gshard", "model.moe.capacity_factor": 1.0,
    "model.moe.transport": "scatter", "train.epsilon": 1e-2, "data.batch": 6,
    "model.moe.sign_bias": 0.01, "model.moe.reroute": True, "train.record_every": 1,
}  # fmt: skip


def lines(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


MESHES = {
    2: {"mesh.fsdp": 2, "mesh.expert": 4},
    4: {"mesh.expert": 2, "mesh.tensor": 2, "mesh.context": 2, "model.moe.tensor": "experts", "data.batch": 3},
}
"""By number of processes; rows of four are read by two of them each."""


@pytest.mark.slow
@pytest.mark.parametrize("processes", MESHES)
def test_b01_processes_are_one(tmp_path, processes):
    """Three steps, evaluation, checkpoints, recorded routing and the held-out loss; the batch has padding, on the last process.
    Integers are equal, reals to 1e-5; the first process writes every line once, the others report nothing."""
    folder = small.prepared(tmp_path / "text")
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    flags = small.flags(folder, **OPTIONS | MESHES[processes])
    joined = [f"--coordinator=localhost:{port}", f"--processes={processes}", f"--workdir={tmp_path / 'two'}"]
    two = [small.start("train", *flags, *joined, f"--process={i}", devices=8 // processes) for i in range(processes)]
    one = small.start("train", *flags, f"--workdir={tmp_path / 'one'}", devices=8)
    answers = [small.finish(process) for process in (*two, one)]
    assert [code for code, _, _ in answers] == [0] * (processes + 1), answers
    # Gloo's threads write to stdout too, over one another: what is ours begins with the name of the run.
    assert "sparse  held-out bits per byte" in answers[0][1]
    assert not any("sparse  " in out for _, out, _ in answers[1:processes])

    wanted, actual = lines(tmp_path / "one"), lines(tmp_path / "two")
    assert [line["step"] for line in wanted] == [1, 2, 2, 3, 3]
    assert (
        len(actual) == len(wanted)
        and wanted[0]["moe/reroute_rate"] > 0
        and wanted[0]["data/padding_rows"] == {2: 2, 4: 1}[processes]
    )
    for line, line_ in zip(wanted, actual, strict=True):
        assert line_ == pytest.approx(line, rel=1e-5)
        assert {k: v for k, v in line_.items() if type(v) is int} == {k: v for k, v in line.items() if type(v) is int}
    assert json.loads((tmp_path / "two" / "run.json").read_text())["processes"] == processes
    assert len(list((tmp_path / "two" / "tensorboard").iterdir())) == 1
    assert {p.name for p in (tmp_path / "two").iterdir()} == {p.name for p in (tmp_path / "one").iterdir()}
    for name in ("assignments/00000003.npz", "routing/probe_00000002.npz"):
        with np.load(tmp_path / "one" / name) as a, np.load(tmp_path / "two" / name) as b:
            small.close(dict(b), dict(a))
