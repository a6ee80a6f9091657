"""Every published family computes here what the reference implementation computes (B32, B33): logits, routing, gradients, decoding."""

import json
import pathlib

import jax
import numpy as np
import pytest
from models.published import Loaded

from moejax.checkpoint.hugging_face import outline
from moejax.checkpoint.hugging_face.families import FAMILIES

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
EXPECTED = {"deepseek_v3_fp8": "deepseek_v3", "gpt_oss_mxfp4": "gpt_oss", "llama4": "llama4_text"}
"""Folders with the weights of another one, in another layout."""
FOLDERS = sorted(folder.parent.name for folder in GOLDEN.glob("*/config.json"))
LEARNED = [name for name in FOLDERS if "loss" in np.load(GOLDEN / EXPECTED.get(name, name) / "expected.npz")]


@pytest.fixture(scope="module")
def loaded():
    """Each checkpoint, loaded once."""
    found = {}
    return lambda name: found.setdefault(name, Loaded.read(GOLDEN / name))


def expected(name):
    return np.load(GOLDEN / EXPECTED.get(name, name) / "expected.npz")


def test_every_family_is_here():
    """And each checkpoint has twelve experts or more, so that 10 and 2 could be confused."""
    there = {json.loads((GOLDEN / name / "config.json").read_text())["model_type"] for name in FOLDERS}
    assert there >= FAMILIES.keys() - {"kimi_k2"} and len(LEARNED) >= 3


@pytest.mark.parametrize("name", FOLDERS)
def test_b33_logits_and_routing(loaded, name):
    """Logits to 1e-5 at every valid position of a full and a padded row, past windows and chunks; the same experts in every layer."""
    wanted, model = expected(name), loaded(name)
    logits, experts = model.run(wanted["tokens"], wanted["mask"])
    assert model.model.moe.num_experts >= 12
    layers = sorted(int(n.split("/")[1]) for n in wanted if n.startswith("experts/"))
    assert len(layers) == len(experts)
    for found, layer in zip(experts, layers, strict=True):
        np.testing.assert_array_equal(np.sort(found), np.sort(wanted[f"experts/{layer}"]), err_msg=f"layer {layer}")
    np.testing.assert_allclose(logits, wanted["logits"], rtol=0, atol=1e-5)
    assert wanted["logits"].std() > 0.1 and wanted["logits_noise"] < 1e-5


@pytest.mark.parametrize("name", [name for name in FOLDERS if name not in EXPECTED])
def test_b36_decoding(loaded, name):
    """Token by token after a first piece, over the edges of windows and chunks: the reference's logits of whole rows, to 1e-5."""
    wanted, model = expected(name), loaded(name)
    tokens, full = wanted["tokens"], int(np.flatnonzero(wanted["mask"].all(axis=1))[0])
    logits = model.decode(tokens, (3, *[1] * (tokens.shape[1] - 3)))
    reference = wanted["logits"][np.nonzero(wanted["mask"])[0] == full]
    np.testing.assert_allclose(logits[full], reference, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", LEARNED)
def test_gradients(loaded, name):
    """Of the mean cross-entropy: 1e-4 of the largest entry, turned into the published layout by the rules of the way back."""
    wanted, model = expected(name), loaded(name)
    value, found = model.gradients(wanted["tokens"], wanted["mask"])
    assert abs(value - wanted["loss"]) < 1e-5
    rules = FAMILIES[json.loads((GOLDEN / name / "config.json").read_text())["model_type"]].rules(model.model)
    rules = [rule for rule in rules if rule.target.startswith("parameters/")]
    jobs = outline.back(rules, found)
    names = [n.removeprefix("gradient/") for n in wanted if n.startswith("gradient/")]
    assert len(names) >= 8
    for published in names:
        gradient = wanted[f"gradient/{published}"]
        tensor, _, expert = published.removesuffix("]").partition("[")
        whole = jax.ShapeDtypeStruct(
            (model.model.moe.num_experts, *gradient.shape) if expert else gradient.shape, gradient.dtype
        )
        own = jobs[tensor].run(found.__getitem__, whole)
        own = own[int(expert)] if expert else own
        np.testing.assert_allclose(own, gradient, rtol=0, atol=1e-4 * np.abs(gradient).max(), err_msg=published)
