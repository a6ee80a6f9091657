"""Published models run here: what moejax computes with the files of this folder is what their own implementation does. Without torch."""

import pathlib
import shutil

import numpy as np
import pytest
from parity import adapter
from safetensors.numpy import load_file, save_file

HERE = pathlib.Path(__file__).parent
FACTOR = 4
"""How much further from the published float32 numbers than these from float64."""
OTHER_FORMS = {"gpt_oss_mxfp4": "gpt_oss", "deepseek_v3_fp8": "deepseek_v3", "llama4": "llama4_text"}
FAMILIES = sorted(path.parent.name for path in HERE.glob("*/expected.npz"))
WITH_GRADIENTS = [name for name in FAMILIES if "loss" in np.load(HERE / name / "expected.npz")]


def expected(family):
    found = np.load(HERE / family / "expected.npz")
    return found, found["tokens"], found["mask"].sum(axis=1)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_choices(family):
    """Of the valid positions of a whole row and of one padded on the right."""
    wanted, tokens, lengths = expected(family)
    found = adapter.answers(*adapter.load(HERE / family), tokens, lengths)
    layers = sorted((name for name in wanted if name.startswith("experts/")), key=lambda name: int(name.split("/")[1]))
    np.testing.assert_array_equal(found["experts"], np.stack([np.sort(wanted[name], axis=-1) for name in layers]))
    np.testing.assert_allclose(found["logits"], wanted["logits"], rtol=0, atol=FACTOR * wanted["logits_noise"])


@pytest.mark.parametrize("form", OTHER_FORMS)
def test_other_forms_are_the_same_model(form):
    """Quantised, with a released config, or inside a multimodal model: every array is the same, bit for bit."""
    (model, flat), (plain_model, plain) = adapter.load(HERE / form), adapter.load(HERE / OTHER_FORMS[form])
    assert model == plain_model and flat.keys() == plain.keys()
    assert not [name for name, x in flat.items() if x.tobytes() != plain[name].tobytes()]


@pytest.mark.parametrize("family", WITH_GRADIENTS)
def test_gradients(family, tmp_path):
    """Of a leaf of every kind. Published gradients go through the same conversion as weights do, and so does a mark on those that are
    there."""
    wanted, tokens, lengths = expected(family)
    loss, found = adapter.gradients(*adapter.load(HERE / family), tokens, lengths)
    assert abs(loss - wanted["loss"]) <= 1e-6
    given = {name.removeprefix("gradient/"): x for name, x in wanted.items() if name.startswith("gradient/")}
    assert len(given) >= 9
    values = as_weights(tmp_path / "values", family, given)
    marks = as_weights(tmp_path / "marks", family, {name: np.ones_like(x) for name, x in given.items()})
    assert sum(mark.sum() for mark in marks.values()) == sum(x.size for x in given.values())
    for name, x in found.items():
        np.testing.assert_allclose(
            x * marks[name], values[name], rtol=0, atol=FACTOR * wanted["gradient_noise"], err_msg=name
        )


def as_weights(folder, family, given):
    """Published arrays -> by path and in the shapes of moejax, zeros elsewhere; NAME[i] is entry i of NAME."""
    folder.mkdir()
    shutil.copy(HERE / family / "config.json", folder)
    stored = {name: np.zeros(x.shape, np.float32) for name, x in load_file(HERE / family / "model.safetensors").items()}
    for name, x in given.items():
        whole, *entry = name.removesuffix("]").split("[")
        stored[whole][int(entry[0]) if entry else ...] = x
    save_file(stored, folder / "model.safetensors")
    return adapter.load(folder)[1]
