"""scripts/surgery.py as a user runs it: a new workdir whose run begins with the changed state at step 0."""

import json

import pytest
from train import small

DENSE = {"model.pattern": ("attention+dense",), "train.steps": 4, "checkpoint.every": 4, "data.batch": 2}
UPCYCLED = DENSE | {
    "model.pattern": ("attention+sparse",), "model.moe.num_experts": 4, "model.moe.hidden": small.OPTIONS["model.hidden"],
}  # fmt: skip
STILL = {"train.steps": 1, "train.warmup": 0, "train.learning_rate": 1e-12, "train.final_learning_rate": 0.0}


@pytest.mark.slow
def test_upcycled_from_the_command_line(tmp_path):
    """The first evaluation of the new run is the last of the old one; training goes on from step 0; a used workdir is refused."""
    folder = small.prepared(tmp_path / "text")
    call = lambda script, *arguments: small.finish(small.start(script, *arguments))  # noqa: E731
    old, new = tmp_path / "dense", tmp_path / "new run"
    code, out, err = call("train", *small.flags(folder, **DENSE), f"--workdir={old}", "--json")
    assert code == 0, err
    before = json.loads(out)

    options = [*small.flags(folder, **(UPCYCLED | STILL)), f"--workdir={new}"]
    surgery = ["--operation=upcycle", f"--from={old}", *options]
    code, out, err = call("surgery", *surgery, "--json")
    assert code == 0, err
    facts = json.loads(out)
    assert facts["preserves"] and facts["from_step"] == 4
    assert facts["parameters"]["after"] > facts["parameters"]["before"]

    code, out, err = call("train", *options, "--json")
    assert code == 0, err
    assert json.loads(out)["heldout/bits_per_byte"] == pytest.approx(before["heldout/bits_per_byte"], rel=1e-5)
    events = [json.loads(line) for line in (new / "events.jsonl").read_text().splitlines()]
    assert [event["event"] for event in events] == ["surgery", "resumed", "ledger"] and events[1]["step"] == 0

    code, out, err = call("surgery", *surgery)
    assert code == 2 and err.startswith("error: ") and "already holds a run" in err and err.count("\n") == 1, err
    code, out, err = call(
        "surgery", "--operation=grow", f"--from={old}", *options[:-1], f"--workdir={tmp_path / 'other'}"
    )
    assert code == 2 and "grow" in err and err.count("\n") == 1, err
    assert not (tmp_path / "other").exists(), "a refused surgery left a claimed workdir"
