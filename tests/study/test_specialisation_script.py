"""scripts/specialisation.py on a model whose experts were planted by hand: what is there is claimed and what is not is not."""

import dataclasses
import json
import re

import jax
import numpy as np
import pages
import pytest
from train import small

from moejax import cli
from moejax.data import tokenizer
from moejax.errors import UserError
from moejax.train import starts

LETTERS = ("abcdef", "ghijkl", "mnopqr", "stuvwx")
"""Of each label its own."""
OTHERS = len(LETTERS)
"""The expert of what belongs to no label."""
OPTIONS = {
    "model.width": 16, "model.moe.num_experts": 6, "model.moe.router": "switch", "model.moe.top_k": 1, "model.moe.hidden": 4,
    "data.context": 32, "model.repeats": 2,
}  # fmt: skip


def planted(workdir):
    """A run at step 0 of two layers: nothing looks at other tokens; a token's embedding names its label, the first router sends it to
    the expert of that label, and what this expert adds is all that tells which letters come next. The second is as it was drawn,
    and adds nothing."""
    cfg = small.configure(**OPTIONS)
    built, start = small.begin(cfg)
    tree = jax.tree.map(np.array, start.parameters)
    layer = tree["blocks"]["layers"][0]
    layer["mixer"]["out"][:] = 0
    tree["embedding"][:], tree["unembedding"][:] = 0, 0
    tree["embedding"][:, OTHERS] = 1
    router, experts = layer["channel"]["router"]["logits"], layer["channel"]["experts"][0]
    router[0] = 0
    for weights in experts.values():
        weights[:] = 0
    for label, letters in enumerate(LETTERS):
        ids = np.frombuffer(letters.encode(), np.uint8)
        tree["embedding"][ids, OTHERS], tree["embedding"][ids, label] = 0, 1
        experts["up"][0, label, label] = experts["gate"][0, label, label] = 1
        experts["down"][0, label, 0, 8 + label] = experts["down"][0, label, 1, 8 + label] = 1
        tree["unembedding"][8 + label, ids] = 3
    router[0, np.arange(OTHERS + 1), np.arange(OTHERS + 1)] = 10
    parameters = jax.tree.map(lambda x, old: jax.device_put(x, old.sharding), tree, start.parameters)
    starts.write(workdir, cfg, dataclasses.replace(start, parameters=parameters), "planted")


def texts(file, shuffled=False):
    """Forty documents of letters of their label; with `shuffled` the labels are dealt out anew."""
    rng = np.random.default_rng(0)
    labels = np.arange(40) % len(LETTERS)
    bodies = ["".join(rng.choice(list(LETTERS[label]), rng.integers(100, 300))) for label in labels]
    named = rng.permutation(labels) if shuffled else labels
    lines = [json.dumps({"text": body, "label": f"kind {label}"}) for body, label in zip(bodies, named, strict=True)]
    file.write_text("\n".join(lines))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("planted")
    planted(folder / "run")
    texts(folder / "true.jsonl")
    texts(folder / "shuffled.jsonl", shuffled=True)
    return folder


def call(capsys, *arguments):
    """What the script prints."""
    with pages.script("scripts/specialisation.py", *map(str, arguments)) as module, small.quick():
        assert cli.parse(["specialisation.py", *map(str, arguments)]) == []
        module.main()
    return capsys.readouterr().out


@pytest.mark.slow
def test_planted_experts_are_claimed_and_missed(run, capsys):
    """The label in the first layer, with NMI above 0.95; without its expert, forbidden or silenced, a label costs more and no other does,
    and a layer that adds nothing is not missed."""
    arguments = f"--workdir={run / 'run'}", f"--files={run / 'true.jsonl'}", "--rows=0", "--ablate=both", "--draws=199"
    found = json.loads(call(capsys, *arguments, "--json"))
    of_label = [own for own in found["information"] if own["attribute"] == "label"]
    assert of_label[0]["nmi"] > 0.95 and of_label[0]["low"] > 0.95 and of_label[0]["p"] <= 0.02
    assert of_label[0]["specialised"] and found["controls"]["claiming"] <= 5
    assert found["documents"] == {f"kind {i}": 10 for i in range(4)} and found["step"] == 0
    for kind in ("forbidden", "silenced"):
        effect, p, low = (np.array(found["ablation"][kind][name], float) for name in ("effect", "p", "low"))
        assert effect.shape == (2, 6, 4)
        np.testing.assert_array_equal(p[0, :4] <= 0.05, np.eye(4, dtype=bool))
        assert (effect[0, range(4), range(4)] > 1).all() and (low[0, range(4), range(4)] > 1).all()
        assert np.abs(effect[0][~np.eye(6, 4, dtype=bool)]).max() < 1e-3
        assert (effect[1] == 0).all() and (p[1] == 1).all(), "to the bit"
    assert found["similarity"]["twins"] == []


@pytest.mark.slow
def test_shuffled_labels_are_not_claimed(run, capsys):
    """The same model and text, the labels dealt out anew: in words, with a page and a picture."""
    out = f"--out={run / 'page.html'}", f"--picture={run / 'page.png'}"
    said = call(
        capsys, f"--workdir={run / 'run'}", f"--files={run / 'shuffled.jsonl'}", "--rows=0", *out, "--draws=199"
    )
    assert len(re.findall(r"^label .* not shown$", said, re.MULTILINE)) == 2 and not re.search(
        "^label .*specialised", said
    )
    assert re.search("^token class +0 .*specialised$", said, re.MULTILINE), (
        "what starts a document has an expert of its own"
    )
    page = (run / "page.html").read_text()
    assert (
        "<svg" in page
        and "not shown" in page
        and 'src="' not in page
        and "http://" not in page.replace("http://www.w3.org", "")
    )
    assert (run / "page.png").read_bytes().startswith(b"\x89PNG") and (run / "page.png").stat().st_size < 150_000


@pytest.mark.slow
def test_languages_and_an_earlier_step(run, capsys):
    """Six languages are the label; an earlier checkpoint must be one, and before."""
    said = call(capsys, f"--workdir={run / 'run'}", "--source=languages", "--rows=40", "--draws=99")
    assert "english" in said and re.search("^language +0 ", said, re.MULTILINE) and tokenizer.NAME not in said
    for arguments, message in (
        (["--earlier=0"], "--earlier=0 is not before step 0; give a smaller one"),
        (["--source=python", "--files=x"], "one text at a time"),
        (["--step=7"], "holds checkpoints of steps [0]; choose one of them"),
        (["--files=" + str(run / "none*")], "matches no file"),
    ):
        with pytest.raises(UserError, match=re.escape(message)):
            call(capsys, f"--workdir={run / 'run'}", "--rows=8", *arguments)
    with pytest.raises(UserError, match="--workdir is missing"):
        call(capsys)
