"""scripts/convert.py as a user runs it: a published checkpoint becomes a run, which trains on and is published again."""

import json

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from checkpoint.published_models import CONFIGS, expected_shapes, read, write
from train import small

from moejax.checkpoint.hugging_face import outline
from moejax.checkpoint.hugging_face.families import FAMILIES

TREE = CONFIGS["mixtral"] | {"vocab_size": 264, "num_local_experts": 4, "sliding_window": None}


def tensors():
    """Random weights in bf16."""
    model = read("mixtral", TREE)
    rng = np.random.default_rng(0)
    shapes = outline.shapes(FAMILIES["mixtral"].rules(model), expected_shapes(model))
    return {name: (0.1 * rng.normal(size=shape)).astype(ml_dtypes.bfloat16) for name, shape in shapes.items()}


@pytest.mark.slow
def test_in_and_out_from_the_command_line(tmp_path):
    """Published again at step 0 it is what it was, bit for bit, tokenizer beside; with two devices as with one; and it trains on."""
    text, folder, run = small.prepared(tmp_path / "text"), tmp_path / "published", tmp_path / "run"
    call = lambda script, *arguments, **how: small.finish(small.start(script, *arguments, **how))  # noqa: E731
    write(folder, "mixtral", tensors(), TREE)
    (folder / "tokenizer.json").write_text("{}")
    options = [
        *small.flags(text, **{"data.batch": 2, "train.steps": 1, "train.warmup": 0, "mesh.fsdp": 2}),
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
    assert (tmp_path / "again" / "tokenizer.json").read_text() == "{}"
    assert json.loads((tmp_path / "again" / "config.json").read_text())["eos_token_id"] == [1, 2]

    code, out, err = call(
        "train", f"--config=configs/of_run.py:{run}", f"--workdir={run}", "--config.mesh.fsdp=1", "--json"
    )
    assert code == 0, err
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    assert [event["event"] for event in events][:2] == ["converted", "resumed"] and events[1]["step"] == 0

    code, out, err = call("convert", f"--from_hf={folder}", *options)
    assert code == 2 and "already holds a run" in err and err.count("\n") == 1, err
    code, out, err = call("convert", f"--workdir={run}", f"--to_hf={tmp_path / 'other'}", "--family=olmoe")
    assert code == 2 and "family olmoe cannot say" in err and err.count("\n") == 1, err
    assert not (tmp_path / "other").exists()
