"""Models made on the spot by the published implementation, converted both ways: the same logits, choices, gradients and files.

Both sides are measured against the published implementation in float64; moejax may be four times as far from it as that
implementation is in float32.
"""

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed here: make parity has an environment with it")
pytest.importorskip("transformers", reason="transformers is not installed here: make parity has an environment with it")

from golden import families, reference
from parity import adapter
from safetensors.torch import load_file, save_file

LENGTHS = (33, 20, 29)
FACTOR = 4
FAMILIES = list(families.FAMILIES)
SEED = 100


@pytest.fixture(scope="module", params=FAMILIES)
def made(request, tmp_path_factory):
    """(family, folder of a random model, that model, tokens)."""
    family = request.param
    folder = tmp_path_factory.mktemp(family)
    model, _ = reference.make(folder, family, SEED + FAMILIES.index(family), **families.LIVE[family])
    return family, folder, model, reference.tokens(SEED, len(LENGTHS), max(LENGTHS), families.SIZES["vocab_size"])


def furthest(x, y):
    return np.abs(np.asarray(x, np.float64) - y).max()


def test_logits_and_choices(made):
    """Those of every valid position; and no expert of a valid token is another."""
    family, folder, model, tokens = made
    ask = lambda m: reference.numpy(reference.answers(m, tokens, LENGTHS))  # noqa: E731
    with torch.no_grad():
        single, double = ask(model), reference.in_float64(family, model, ask)
    found = adapter.answers(*adapter.load(folder), tokens, LENGTHS)
    layers = sorted((name for name in double if name.startswith("experts/")), key=lambda name: int(name.split("/")[1]))
    np.testing.assert_array_equal(found["experts"], np.stack([np.sort(double[name], axis=-1) for name in layers]))
    noise = furthest(single["logits"], double["logits"])
    assert furthest(found["logits"], double["logits"]) <= FACTOR * noise, noise


@pytest.mark.parametrize("made", ["mixtral", "gpt_oss", "deepseek_v3"], indirect=True)
def test_gradients(made, tmp_path):
    """Of every parameter. The published gradients go through the same conversion as weights do, which only moves numbers."""
    family, folder, model, tokens = made
    single = reference.gradients(model, tokens, LENGTHS)
    double = reference.in_float64(family, model, lambda twin: reference.gradients(twin, tokens, LENGTHS))
    value, found = adapter.gradients(*adapter.load(folder), tokens, LENGTHS)
    assert abs(value - double[0].item()) <= FACTOR * max(abs(single[0].item() - double[0].item()), 2.0**-23)

    one, two = (as_weights(tmp_path / name, folder, g[1]) for name, g in (("single", single), ("double", double)))
    assert found.keys() == {name for name in two if name.startswith("parameters/")}
    scale = {name: np.abs(two[name]).max() for name in found}
    noise = max(furthest(one[name], two[name]) / scale[name] for name in found)
    far = {name: furthest(x, two[name]) / scale[name] for name, x in found.items()}
    worst = max(far, key=far.get)
    assert far[worst] <= FACTOR * noise, (noise, worst, far[worst])


def as_weights(folder, original, gradients):
    """Gradients by published name -> by path and in the shapes of moejax; zeros for what has none."""
    folder.mkdir()
    (folder / "config.json").write_text((original / "config.json").read_text())
    weights = load_file(original / "model.safetensors")
    assert gradients.keys() <= weights.keys()
    stored = {name: torch.zeros_like(x, dtype=torch.float32) for name, x in weights.items()}
    stored |= {name: g.float() for name, g in gradients.items()}
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    return adapter.load(folder)[1]


def test_round_trip(made, tmp_path):
    """Saved by moejax and loaded by transformers: no tensor is missing, unexpected or changed by a bit, and the config means the same."""
    family, folder, model, tokens = made
    adapter.save(tmp_path, *adapter.load(folder), family)
    again = reference.read(tmp_path, family)
    before, after = model.state_dict(), again.state_dict()
    assert before.keys() == after.keys()
    assert not [name for name, x in before.items() if not torch.equal(x, after[name])]
    with torch.no_grad():
        logits = [reference.answers(m, tokens, LENGTHS)["logits"] for m in (model, again)]
    assert torch.equal(*logits)


def test_shards_are_read_as_one_file(made, tmp_path):
    """As transformers writes them, with an index."""
    family, folder, _, _ = made
    reference.read(folder, family).bfloat16().save_pretrained(tmp_path, max_shard_size="64KB")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    one, many = adapter.load(folder), adapter.load(tmp_path)
    assert one[0] == many[0] and one[1].keys() == many[1].keys()
    assert not [name for name, x in one[1].items() if x.tobytes() != many[1][name].tobytes()]
