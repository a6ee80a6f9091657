"""scripts/evaluate.py as a user runs it: the run's own number again, other text, questions, and what is wrong in one line."""

import json

import pytest
from data import tiny_tokenizer
from train import small

QUESTIONS = [
    {"prompt": "7 the token is", "choices": [" a router", "\u0000\u0001\u0002\u0003\u0004\u0005"], "answer": 0},
    {"prompt": "8 expert of", "choices": [" the", " mesh é", " gate"], "answer": 2},
]


@pytest.mark.slow
def test_a_run_is_judged_from_the_command_line(tmp_path):
    """A run over two devices in the vocabulary of a tokenizer.json: its held-out numbers on its mesh and on one device, an earlier step on
    other files, questions; unknown steps, wrong lines, and folders without a checkpoint."""
    words = tiny_tokenizer.folder(tmp_path / "words")
    for document in small.documents():
        (tmp_path / f"{document.name}.txt").write_bytes(document.text)
    (tmp_path / "other.md").write_text("the router of the mesh is a gate 😀")
    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, QUESTIONS)))
    (tmp_path / "wrong.jsonl").write_text(json.dumps(QUESTIONS[0] | {"answer": "a"}))
    options = {
        "data.source": "files", "data.files": str(tmp_path / "*.txt"), "data.cache": str(tmp_path / "tokens"),
        "data.tokenizer": str(words), "data.heldout": 0.25, "data.batch": 4, "mesh.expert": 2, "model.vocab_size": 304,
        "model.loss_chunk": 152, "model.moe.num_experts": 4, "train.steps": 4, "checkpoint.every": 2,
    }  # fmt: skip
    run, bare = tmp_path / "run", tmp_path / "bare"

    def call(script, *arguments, devices=2):
        return small.finish(small.start(script, *arguments, devices=devices))

    code, out, err = call("train", *small.flags(tmp_path, **options), f"--workdir={run}", "--json")
    assert code == 0, err
    last = json.loads(out)

    code, out, err = call("evaluate", f"--workdir={run}", "--json")
    assert code == 0, err
    found = json.loads(out)
    assert found["step"] == 4 and "choices" not in found
    assert {name: found["text"][name] for name in last} == last, "the same rows, the same program"
    assert found["text"]["heldout/bytes"] > found["text"]["heldout/targets"]

    code, out, err = call("evaluate", f"--workdir={run}", devices=1)
    assert code == 0, err
    assert "step 4, on one device" in out and f"{last['heldout/bits_per_byte']:.3f}" in out

    asked = [f"--workdir={run}", "--step=2", f"--choices={tmp_path / 'questions.jsonl'}"]
    code, out, err = call("evaluate", *asked, f"--files={tmp_path / 'other.md'}", "--json")
    assert code == 0, err
    found = json.loads(out)
    assert found["step"] == 2 and found["text"]["files/bytes"] == len((tmp_path / "other.md").read_bytes())
    assert found["text"]["files/rows"] + found["text"]["files/padding_rows"] == 4
    assert found["choices"]["questions"] == 2 and found["choices"]["choices"] == 5
    assert found["choices"]["chance"] == pytest.approx((1 / 2 + 1 / 3) / 2)
    assert found["choices"]["accuracy"] in (0, 0.5, 1) and found["choices"]["padding_rows"] > 0

    code, out, err = call("evaluate", *asked)
    assert code == 0 and "accuracy" in out and "by likelihood per byte" in out and "loss" not in out, err

    bare.mkdir()
    (bare / "config.json").write_text((run / "config.json").read_text())
    for arguments, message in (
        ((f"--workdir={run}", "--step=3"), "holds checkpoints of steps [2, 4]; choose one of them"),
        ((f"--workdir={run}", f"--choices={tmp_path / 'wrong.jsonl'}"), "wrong.jsonl:1 has answer 'a'"),
        ((f"--workdir={run}", f"--files={tmp_path / 'none*'}"), "matches no file"),
        ((f"--workdir={bare}",), "holds no checkpoint yet"),
        ((f"--workdir={tmp_path}",), "is no run: it has no config.json"),
        ((*asked, "--rows=3"), "--rows=3 does nothing with --choices alone"),
    ):
        code, _, err = call("evaluate", *arguments)
        assert code == 2 and err.startswith("error: ") and message in err and err.count("\n") == 1, err
    assert not (bare / "checkpoints").exists()
