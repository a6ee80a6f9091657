"""scripts/generate.py as a user runs it: prompts together and alone, on one device and on two, and what is wrong in one line."""

import json

import pytest
from data import tiny_tokenizer
from train import small

PROMPTS = ("the router", "é of", "gate gate gate gate gate")


@pytest.mark.slow
def test_a_run_speaks_from_the_command_line(tmp_path):
    """In the vocabulary of a tokenizer.json: each prompt alone says what it says among others, on two devices as on one; drawn text comes
    again with its seed; a single answer is written as it comes; unknown workdirs and sizes that do not fit are one line."""
    words = tiny_tokenizer.folder(tmp_path / "words")
    for document in small.documents():
        (tmp_path / f"{document.name}.txt").write_bytes(document.text)
    options = {
        "data.source": "files", "data.files": str(tmp_path / "*.txt"), "data.cache": str(tmp_path / "tokens"),
        "data.tokenizer": str(words), "data.heldout": 0.25, "data.batch": 4, "mesh.expert": 2, "model.vocab_size": 304,
        "model.loss_chunk": 152, "model.moe.num_experts": 4, "train.steps": 3, "train.learning_rate": 0.05,
    }  # fmt: skip
    run = tmp_path / "run"

    def call(script, *arguments, devices=2):
        return small.finish(small.start(script, *arguments, devices=devices))

    code, out, err = call("train", *small.flags(tmp_path, **options), f"--workdir={run}")
    assert code == 0, err

    def answers(*prompts, devices=2, more=()):
        asked = [f"--prompt={text}" for text in prompts]
        fixed = (f"--workdir={run}", "--tokens=12", "--rows=4", "--positions=48", "--piece=8", "--json")
        code, out, err = call("generate", *fixed, *asked, *more, devices=devices)
        assert code == 0, err
        return [answer["ids"] for answer in json.loads(out)["answers"]]

    together = answers(*PROMPTS)
    assert [len(ids) for ids in together] == [12] * 3
    assert answers(PROMPTS[1]) == [together[1]] and answers(*PROMPTS, devices=1) == together
    draws = ("--temperature=1.5", "--top_p=0.9", "--seed=5")
    drawn = answers(*PROMPTS, more=draws)
    assert drawn != together and answers(*PROMPTS[:1], more=draws) == drawn[:1]

    code, out, err = call("generate", f"--workdir={run}", f"--prompt={PROMPTS[0]}", "--tokens=12", devices=1)
    assert code == 0 and "12 tokens at step 3" in out, err
    for wrong, said in (
        (("--workdir=nothing", "--prompt=a"), "is no run"),
        ((f"--workdir={run}",), "--prompt are needed"),
        ((f"--workdir={run}", "--prompt=a", "--positions=5"), "raise --rows or --positions"),
        ((f"--workdir={run}", "--prompt=a", "--rows=3"), "choose a multiple of 2"),
        ((f"--workdir={run}", "--prompt=a", "--top_p=0"), "top_p in (0, 1]"),
    ):
        code, out, err = call("generate", *wrong)
        assert code == 2 and said in err and err.count("\n") == 1, err
