"""Weights of published models: names, values, and what is left behind, for every family."""

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from checkpoint.published_models import CONFIGS, read, weights, write
from models.published import leaves

from moejax.checkpoint.hugging_face import depth, outline
from moejax.checkpoint.hugging_face.families import FAMILIES
from moejax.checkpoint.hugging_face.published import load, open_published
from moejax.checkpoint.hugging_face.save import save
from moejax.errors import ConfigError, UserError

MLP = "mlp.experts.0.gate_proj mlp.experts.0.up_proj mlp.experts.0.down_proj mlp.gate"
SHARED = "mlp.shared_experts.gate_proj mlp.shared_experts.up_proj mlp.shared_experts.down_proj"
LOW_RANK = "self_attn.kv_a_proj_with_mqa self_attn.kv_b_proj self_attn.kv_a_layernorm self_attn.o_proj"
QKVO = "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.o_proj"
LAST = {
    "mixtral": f"{QKVO} block_sparse_moe.experts.0.w1 block_sparse_moe.experts.0.w2 block_sparse_moe.experts.0.w3 block_sparse_moe.gate",
    "olmoe": f"{QKVO} {MLP} self_attn.q_norm self_attn.k_norm",
    "qwen2_moe": f"{QKVO} {MLP} self_attn.q_proj.bias self_attn.k_proj.bias self_attn.v_proj.bias mlp.shared_expert.gate_proj "
    "mlp.shared_expert.up_proj mlp.shared_expert.down_proj mlp.shared_expert_gate",
    "glm4_moe": f"{QKVO} {MLP} {SHARED} self_attn.q_norm self_attn.k_norm self_attn.q_proj.bias self_attn.k_proj.bias "
    "self_attn.v_proj.bias mlp.gate.e_score_correction_bias",
    "gpt_oss": f"{QKVO} self_attn.q_proj.bias self_attn.k_proj.bias self_attn.v_proj.bias self_attn.o_proj.bias self_attn.sinks. "
    "mlp.router mlp.router.bias mlp.experts.gate_up_proj. mlp.experts.gate_up_proj_bias mlp.experts.down_proj. mlp.experts.down_proj_bias",
    "llama4_text": f"{QKVO} feed_forward.router feed_forward.experts.gate_up_proj. feed_forward.experts.down_proj. "
    "feed_forward.shared_expert.gate_proj feed_forward.shared_expert.up_proj feed_forward.shared_expert.down_proj",
    "minimax_m2": f"{QKVO} block_sparse_moe.experts.0.w1 block_sparse_moe.experts.0.w2 block_sparse_moe.experts.0.w3 block_sparse_moe.gate "
    "block_sparse_moe.e_score_correction_bias self_attn.q_norm self_attn.k_norm",
    "deepseek_v3": f"{LOW_RANK} {MLP} {SHARED} self_attn.q_a_proj self_attn.q_b_proj self_attn.q_a_layernorm "
    "mlp.gate.e_score_correction_bias",
    "deepseek_v2": f"{LOW_RANK} {MLP} {SHARED} self_attn.q_proj",
}  # fmt: skip
"""What transformers 5.23 saves of a sparse layer, of expert 0, beside its two norms; `.weight` where nothing else is said."""


@pytest.mark.parametrize("name", LAST)
def test_names_are_those_of_transformers(name):
    model = read(name)
    layer = f"model.layers.{depth.of_channel(model, 'sparse')[-1]}."
    found = {n.removeprefix(layer) for n in weights(name) if n.startswith(layer)}
    own = {n if "bias" in n else n.removesuffix(".") if n.endswith(".") else f"{n}.weight" for n in LAST[name].split()}
    norms = {"input_layernorm.weight", "post_attention_layernorm.weight"}
    assert {
        n for n in found if ".experts." not in n or ".experts.0." in n or "proj_bias" in n or n.endswith("_proj")
    } == own | norms
    assert {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"} == {
        n for n in weights(name) if "layers" not in n
    }


@pytest.mark.parametrize("name", FAMILIES)
def test_weights_there_and_back(name, tmp_path):
    """Bit for bit, from one file to several shards that the safetensors library reads, and into float32 on the way."""
    tensors = weights(name, ml_dtypes.bfloat16)
    model, flat = load(write(tmp_path / "in", name, tensors), leaves)
    shapes = leaves(model)
    assert model == read(name) and {path: leaf.shape for path, leaf in flat.items()} == {
        path: leaf.shape for path, leaf in shapes.items()
    }
    assert all(leaf.dtype == np.float32 for leaf in flat.values())
    save(tmp_path / "out", model, shapes, flat.__getitem__, family=name, shard_bytes=6000)
    again = {}
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 3 and files[0].name == f"model-00001-of-{len(files):05}.safetensors"
    for file in files:
        again |= safetensors.numpy.load_file(file)
    prefix = "language_model." if name == "llama4" else ""
    assert {f"{prefix}{n}" for n in again} == tensors.keys()
    for path, value in again.items():
        wanted = tensors[f"{prefix}{path}"]
        assert value.astype(np.float32).tobytes() == wanted.astype(np.float32).tobytes(), path
        assert value.dtype == (np.float32 if "correction" in path else ml_dtypes.bfloat16)
    second, flat_again = load(tmp_path / "out", leaves)
    assert second == model and all(flat_again[path].tobytes() == flat[path].tobytes() for path in flat)


def test_experts_in_numeric_order_and_the_right_way_round(tmp_path):
    """Expert 10 after expert 9; an expert as wide as the model, a square matrix, is turned all the same."""
    tree = CONFIGS["mixtral"] | {"intermediate_size": 16}
    base = {n: np.zeros((16, 16), np.float32) if "experts" in n else x for n, x in weights("mixtral").items()}
    for n in (n for n in base if ".w3." in n):
        base[n] = base[n] + int(n.split(".")[5]) + np.arange(16, dtype=np.float32)[:, None] / 16
    _, flat = load(write(tmp_path, "mixtral", base, tree), leaves)
    up = flat["parameters/blocks/layers/0/channel/experts/0/up"]
    np.testing.assert_array_equal(up[1, :, 0, 0], np.arange(12))
    np.testing.assert_array_equal(up[1, 3, 5], 3 + np.arange(16) / 16)


def test_what_layers_of_weights_mean(tmp_path):
    """Heads, gate and up, alternating columns, and biases in order of depth, said in plain NumPy."""
    tensors = weights("gpt_oss")
    model, flat = load(write(tmp_path / "oss", "gpt_oss", tensors), leaves)
    fused = tensors["model.layers.2.mlp.experts.gate_up_proj"]
    np.testing.assert_array_equal(flat["parameters/blocks/layers/0/channel/experts/0/gate"][1], fused[..., ::2])
    np.testing.assert_array_equal(flat["parameters/blocks/layers/0/channel/experts/0/up"][1], fused[..., 1::2])
    query = tensors["model.layers.3.self_attn.q_proj.weight"]
    np.testing.assert_array_equal(flat["parameters/blocks/layers/1/mixer/query"][1][:, 2], query[2 * 8 : 3 * 8].T)
    tensors = weights("deepseek_v3")
    _, flat = load(write(tmp_path / "v3", "deepseek_v3", tensors), leaves)
    for row, layer in enumerate((1, 2)):
        wanted = tensors[f"model.layers.{layer}.mlp.gate.e_score_correction_bias"]
        np.testing.assert_array_equal(flat["routing/sparse/selection_bias"][row], wanted)
    np.testing.assert_array_equal(
        flat["parameters/first/0/channel/mlp/gate_up"][:, 1], tensors["model.layers.0.mlp.up_proj.weight"].T
    )
    up = tensors["model.layers.0.self_attn.kv_b_proj.weight"].reshape(4, 6 + 8, 10)
    np.testing.assert_array_equal(flat["parameters/first/0/mixer/latent_up"], up.transpose(2, 0, 1))
    tensors = weights("llama4")
    _, flat = load(write(tmp_path / "llama", "llama4", tensors), leaves)
    fused = tensors["language_model.model.layers.7.feed_forward.experts.gate_up_proj"]
    np.testing.assert_array_equal(flat["parameters/blocks/layers/3/channel/experts/0/up"][1], fused[..., 8:])


def test_what_is_left_behind_is_told(tmp_path):
    """Layers past the last one and buffers, with the reason; a tensor that nobody knows is an error."""
    extra = {
        "model.layers.3.eh_proj.weight": np.zeros((2, 2), np.float32),
        "model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(2, np.float32),
    }
    published = open_published(write(tmp_path / "a", "deepseek_v3", weights("deepseek_v3") | extra))
    rows = {row["name"]: row for row in published.report(published.plan(leaves(published.model)))}
    assert rows.keys() == weights("deepseek_v3").keys() | extra.keys()
    assert "MTP" in rows["model.layers.3.eh_proj.weight"]["why"] and not rows["model.layers.3.eh_proj.weight"]["became"]
    assert rows["lm_head.weight"] == {"name": "lm_head.weight", "became": "parameters/unembedding", "why": "read"}
    unknown = open_published(
        write(
            tmp_path / "b",
            "mixtral",
            weights("mixtral") | {"model.layers.0.extra": extra["model.layers.3.eh_proj.weight"]},
        )
    )
    with pytest.raises(UserError, match=r"no rule reads model.layers.0.extra"):
        unknown.plan(leaves(unknown.model))


def test_leaves_without_a_tensor_are_not_lost(tmp_path):
    """A leaf that no tensor holds, such as a gate of the shared expert, is no part of the family."""
    model, flat = load(write(tmp_path / "in", "mixtral"), leaves)
    shapes = leaves(model) | {"parameters/blocks/layers/0/channel/shared_gate": flat["parameters/final_norm/scale"]}
    with pytest.raises(ConfigError, match="shared_gate"):
        save(tmp_path / "out", model, shapes, flat.__getitem__, family="mixtral")
    with pytest.raises(UserError, match="already holds"):
        save(tmp_path / "in", model, leaves(model), flat.__getitem__, family="mixtral")


def test_every_rule_turns_round_and_gathers_last():
    """So that weights can be written, and parts made alone."""
    for name, family in FAMILIES.items():
        rules = family.rules(read(name))
        assert outline.back(rules, leaves(read(name))).keys() == weights(name).keys()
