"""scripts/convert.py as a user runs it: a published checkpoint becomes a run, which trains on and is published again."""

import json

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from checkpoint.published_models import CONFIGS, read, write
from data import tiny_tokenizer
from models.published import leaves
from train import small

from moejax.checkpoint.hugging_face import outline
from moejax.checkpoint.hugging_face.families import FAMILIES
from moejax.checkpoint.hugging_face.save import save
from moejax.train import saved

TREE = CONFIGS["mixtral"] | {"vocab_size": 304, "num_local_experts": 4, "sliding_window": None}


def tensors():
    """Random weights in bf16."""
    model = read("mixtral", TREE)
    rng = np.random.default_rng(0)
    shapes = outline.shapes(FAMILIES["mixtral"].rules(model), leaves(model))
    return {name: (0.1 * rng.normal(size=shape)).astype(ml_dtypes.bfloat16) for name, shape in shapes.items()}


@pytest.mark.slow
def test_in_and_out_from_the_command_line(tmp_path):
    """Published again at step 0 it is what it was, bit for bit, tokenizer beside; with two devices as with one; it trains on in its own
    vocabulary, and speaks."""
    folder, run = tiny_tokenizer.folder(tmp_path / "published"), tmp_path / "run"
    words = (folder / "tokenizer.json").read_text()
    for document in small.documents():
        (tmp_path / f"{document.name}.txt").write_bytes(document.text)
    text = {
        "data.source": "files",
        "data.files": str(tmp_path / "*.txt"),
        "data.cache": str(tmp_path / "tokens"),
        "data.heldout": 0.25,
    }
    call = lambda script, *arguments, **how: small.finish(small.start(script, *arguments, **how))  # noqa: E731
    write(folder, "mixtral", tensors(), TREE)
    options = [
        *small.flags(tmp_path, **text, **{"data.batch": 2, "train.steps": 1, "train.warmup": 0, "mesh.fsdp": 2}),
        f"--workdir={run}",
    ]
    code, out, err = call("convert", f"--from_hf={folder}", *options, "--json", devices=2)
    assert code == 0, err
    facts = json.loads(out)
    assert facts["tensors"] == {"read": len(tensors())} and {row["name"] for row in facts["report"]} == tensors().keys()
    assert facts["numbers"] == sum(x.size for x in tensors().values())

    code, out, err = call("convert", f"--workdir={run}", f"--to_hf={tmp_path / 'again'}")
    assert code == 0 and out.startswith("mixtral written"), err
    again = safetensors.numpy.load_file(tmp_path / "again" / "model.safetensors")
    assert again.keys() == tensors().keys() and all(
        again[name].tobytes() == x.tobytes() for name, x in tensors().items()
    )
    assert (tmp_path / "again" / "tokenizer.json").read_text() == words
    assert json.loads((tmp_path / "again" / "config.json").read_text())["eos_token_id"] == [1, 2]

    code, out, err = call(
        "train", f"--config=configs/of_run.py:{run}", f"--workdir={run}", "--config.mesh.fsdp=1", "--json"
    )
    assert code == 0, err
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    assert [event["event"] for event in events][:2] == ["converted", "resumed"] and events[1]["step"] == 0

    code, out, err = call("generate", f"--workdir={run}", "--prompt=the router", "--tokens=4")
    assert code == 0 and "4 tokens at step 1" in out, err

    code, out, err = call("convert", f"--from_hf={folder}", *options)
    assert code == 2 and "already holds a run" in err and err.count("\n") == 1, err
    code, out, err = call("convert", f"--workdir={run}", f"--to_hf={tmp_path / 'other'}", "--family=olmoe")
    assert code == 2 and "family olmoe cannot say" in err and err.count("\n") == 1, err
    assert not (tmp_path / "other").exists()


@pytest.mark.slow
def test_a_bias_that_training_moved_is_published(tmp_path):
    """Trained with experts on two devices: the correction that is written is what came in and what balancing added, per layer and
    expert; and what is written begins a run like any other."""
    text, folder, run = small.prepared(tmp_path / "text"), tmp_path / "published", tmp_path / "run"
    model = read("deepseek_v3", CONFIGS["deepseek_v3"] | {"vocab_size": 264})
    rng = np.random.default_rng(0)
    values = {path: 0.1 * rng.normal(size=leaf.shape).astype(np.float32) for path, leaf in leaves(model).items()}
    save(folder, model, leaves(model), values.__getitem__, family="deepseek_v3")
    options = {"data.batch": 4, "train.steps": 3, "train.warmup": 0, "mesh.expert": 2, "model.moe.sign_bias": 0.01}
    run_it = [f"--config=configs/of_run.py:{run}", f"--workdir={run}"]
    for script, *arguments in (
        ("convert", f"--from_hf={folder}", f"--workdir={run}", *small.flags(text, **options)),
        ("train", *run_it),
        ("convert", f"--workdir={run}", f"--to_hf={tmp_path / 'again'}"),
        ("convert", f"--from_hf={tmp_path / 'again'}", f"--workdir={tmp_path / 'second'}"),
    ):
        code, _, err = small.finish(small.start(script, *arguments, devices=2))
        assert code == 0, err

    _, number, kept = saved.read_arrays(run)
    came, moved = kept["routing/sparse/selection_bias"], kept["routing/sparse/sign_bias"]
    np.testing.assert_array_equal(came, values["routing/sparse/selection_bias"])
    assert number == 3 and np.abs(moved).max() >= 0.01
    again = safetensors.numpy.load_file(tmp_path / "again" / "model.safetensors")
    for row, layer in enumerate((1, 2)):
        written = again[f"model.layers.{layer}.mlp.gate.e_score_correction_bias"]
        assert written.dtype == np.float32
        np.testing.assert_array_equal(written, came[row] + moved[row])
    _, _, second = saved.read_arrays(tmp_path / "second")
    np.testing.assert_array_equal(second["routing/sparse/selection_bias"], came + moved)
