"""tests/golden is what the pinned version of the published implementation says, in every form the weights are written in."""

import pathlib

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed here: make parity has an environment with it")
transformers = pytest.importorskip("transformers", reason="transformers is not installed here: make parity has it")

from golden import families, quantised, reference
from safetensors.torch import load_file

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"


@pytest.mark.parametrize("family", families.FAMILIES)
def test_expected_values(family):
    """Up to what another machine's order of sums may change: ten times the recorded noise."""
    wanted = np.load(GOLDEN / family / "expected.npz")
    with torch.no_grad():
        model = reference.read(GOLDEN / family, family)
        found = reference.answers(model, wanted["tokens"].astype(np.int64), wanted["mask"].sum(1))
    for name in (name for name in wanted if name.startswith("experts/")):
        np.testing.assert_array_equal(found[name], wanted[name])
    np.testing.assert_allclose(found["logits"], wanted["logits"], rtol=0, atol=10 * wanted["logits_noise"])


def test_mxfp4_is_the_same_weights():
    """As transformers unpacks them."""
    model = transformers.GptOssForCausalLM.from_pretrained(
        GOLDEN / "gpt_oss_mxfp4", quantization_config=transformers.Mxfp4Config(dequantize=True), dtype=torch.float32
    )
    plain = reference.read(GOLDEN / "gpt_oss", "gpt_oss").state_dict()
    assert not [name for name, x in model.state_dict().items() if not torch.equal(x.float(), plain[name])]


def test_fp8_is_the_same_weights():
    """Some matrices have blocks of several scales, some end in smaller blocks."""
    plain, stored = (load_file(GOLDEN / name / "model.safetensors") for name in ("deepseek_v3", "deepseek_v3_fp8"))
    several, smaller = 0, 0
    for name in filter(quantised.is_fp8, plain):
        weight, scale = stored[name], stored[f"{name}_scale_inv"]
        rows, columns = (torch.arange(size) // quantised.BLOCK for size in weight.shape)
        assert weight.dtype == torch.float8_e4m3fn
        assert torch.equal(weight.float() * scale[rows[:, None], columns[None]], plain[name].float())
        several += len(scale.unique()) > 1
        smaller += any(size % quantised.BLOCK for size in weight.shape)
    assert several and smaller


def test_the_multimodal_form_is_the_same_weights():
    """Beside them lies a tensor of the vision model."""
    config = transformers.AutoConfig.from_pretrained(GOLDEN / "llama4")
    plain, stored = (load_file(GOLDEN / name / "model.safetensors") for name in ("llama4_text", "llama4"))
    assert isinstance(config.text_config, transformers.Llama4TextConfig)
    assert {f"language_model.{name}" for name in plain} | {"vision_model.class_embedding"} == stored.keys()
    assert not [name for name, x in plain.items() if not torch.equal(x, stored[f"language_model.{name}"])]
