"""config.json of published models: what it means, there and back, and what is refused."""

import dataclasses
import json
import math

import numpy as np
import pytest
from checkpoint.published_models import CONFIGS, YARN, read
from models.published import leaves

from moejax.checkpoint.hugging_face import depth, outline, rotary
from moejax.checkpoint.hugging_face.families import FAMILIES
from moejax.checkpoint.hugging_face.fields import Fields
from moejax.checkpoint.hugging_face.save import describe, fitting
from moejax.errors import ConfigError, UserError


@pytest.mark.parametrize("name", FAMILIES)
def test_config_there_and_back(name):
    """What is written is read as the same model, token ids and the like are kept, and no other family takes it for its own."""
    model = read(name)
    tree = json.loads(json.dumps(describe(model, name, CONFIGS[name])))
    family = FAMILIES[name].written_as or name
    assert tree["model_type"] == family and tree["architectures"] == [FAMILIES[family].architecture]
    assert read(family, tree) == model
    if name != "llama4":
        assert tree["eos_token_id"] == [1, 2] and tree["initializer_range"] == 0.02
    assert fitting(model) == [family]


def test_layers():
    """The fewest different layers: what repeats is a pattern, what comes before stands alone."""
    cases = {
        "ssss": ((), ("s",), 4),
        "dddsss": (("d", "d", "d"), ("s",), 3),
        "dssss": (("d",), ("s",), 4),
        "abab": ((), ("a", "b"), 2),
        "abababab": ((), ("a", "b"), 4),
        "babab": (("b",), ("a", "b"), 2),
        "aababaab": ((), tuple("aababaab"), 1),
        "s": ((), ("s",), 1),
    }
    for kinds, (first, pattern, repeats) in cases.items():
        assert depth.fold(list(kinds)) == {"first": first, "pattern": pattern, "repeats": repeats}, kinds
    assert read("qwen3_moe").first == ("attention+dense",) and read("qwen3_moe").pattern == (
        "attention+sparse",
        "attention+dense",
    )
    assert read("llama4_text").pattern == ("local+dense", "local+sparse", "local+dense", "attention+sparse")
    assert read("gpt_oss").pattern == ("local+sparse", "attention+sparse")


def test_what_the_fields_mean():
    """The mathematics of each family, by option."""
    v3, v2, oss, llama = (read(name) for name in ("deepseek_v3", "deepseek_v2", "gpt_oss", "llama4_text"))
    assert (v3.moe.score, v3.moe.selection_bias, v3.moe.router_groups, v3.moe.router_groups_kept) == (
        "sigmoid",
        True,
        4,
        2,
    )
    assert (v3.moe.gate_scale, v3.moe.shared_hidden, v3.moe.renormalize, v3.moe.router_groups_best) == (
        2.5,
        16,
        True,
        2,
    )
    assert (
        v3.rope.interleaved and v3.rope.mscale_all == 1 and v3.latent.norm_epsilon == 1e-6 and v3.norm_epsilon == 1e-5
    )
    assert (v2.moe.score, v2.moe.selection_bias, v2.moe.router_groups_best, v2.moe.renormalize) == (
        "softmax",
        False,
        1,
        False,
    )
    assert v2.latent.query_rank == 0 and v2.rope.magnitude == pytest.approx(0.1 * np.log(4) + 1)
    assert (oss.moe.score, oss.moe.activation, oss.moe.activation_clamp) == ("softmax_after", "gpt_oss", 7.0)
    assert oss.local.window == 5 and oss.attention.window == 0 and oss.attention.sinks and oss.local.out_bias
    assert not oss.rope.truncate and oss.rope.factor == 4
    assert llama.moe.gate_at == "input" and not llama.moe.renormalize and llama.moe.shared_hidden == 8
    assert (
        llama.local.norm == "l2"
        and llama.local.chunk == 6
        and not llama.attention.rotary
        and llama.attention.norm == "none"
    )
    assert (
        llama.attention.temperature == 0.1
        and llama.attention.temperature_positions == 8192
        and llama.rope.scaling == "llama3"
    )
    assert read("minimax_m2").rope.fraction == read("glm4_moe").rope.fraction == 0.5
    assert (
        read("mixtral").attention.window == 7
        and read("olmoe").attention.norm == "whole"
        and not read("olmoe").moe.renormalize
    )
    for name in FAMILIES:
        model = read(name)
        assert model.moe.capacity_factor is None and model.vocab_size % model.loss_chunk == 0


def test_rotary_positions_in_both_spellings():
    """Of transformers 5 and of before: the same model."""
    new = CONFIGS["kimi_k2"]
    old = {name: value for name, value in new.items() if name != "rope_parameters"} | {
        "rope_theta": 10000,
        "rope_scaling": {"type": "yarn"} | {n: v for n, v in new["rope_parameters"].items() if n not in ("rope_type", "rope_theta")},
    }  # fmt: skip
    assert read("kimi_k2", old) == read("kimi_k2")
    for parameters, word in (
        ({"rope_type": "longrope", "rope_theta": 1.0}, "longrope"),
        (YARN | {"short_factor": [1]}, "short_factor"),
        ({"rope_type": "linear", "rope_theta": 1.0}, "factor"),
    ):
        with pytest.raises(UserError, match=word):
            rotary.read(Fields({"rope_parameters": parameters}, "config.json"))


REFUSED = {
    "an unknown field": ("mixtral", {"attention_gate": True}, "attention_gate=True is not known"),
    "another activation": ("mixtral", {"hidden_act": "gelu"}, "hidden_act='gelu'"),
    "tied embeddings": ("olmoe", {"tie_word_embeddings": True}, "tie_word_embeddings=True"),
    "clipped projections": ("olmoe", {"clip_qkv": 8.0}, "clip_qkv=8.0"),
    "a field that is missing": ("qwen3_moe", {"moe_intermediate_size": None}, "has no moe_intermediate_size"),
    "one field with two values": ("gpt_oss", {"experts_per_token": 3}, "several values"),
    "a layer of an unknown type": ("gpt_oss", {"layer_types": ["linear_attention"] * 4}, "layer_types"),
    "chunks without rotary positions": ("llama4_text", {"layer_types": ["full_attention"] * 8}, "no_rope_layers"),
    "another router": ("deepseek_v3", {"topk_method": "greedy"}, "topk_method='greedy'"),
    "windows in some layers": ("qwen2_moe", {"use_sliding_window": True}, "use_sliding_window=True"),
    "linear attention": ("minimax_m2", {"attn_type_list": [0, 1]}, "attn_type_list"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_config_is_read_strictly(name):
    """One line that names the field."""
    family, change, words = REFUSED[name]
    with pytest.raises(UserError, match=words) as caught:
        read(family, CONFIGS[family] | change)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [{"activation": "relu"}, {"zero_experts": ("identity",)}, {"router": "switch"}, {"latent": 8}, {"gate_scale": 2.0}],
    ids=str,
)
def test_a_model_that_a_family_cannot_say(change):
    """It is not written as something else."""
    model = read("mixtral")
    with pytest.raises(ConfigError, match=f"family mixtral cannot say model.moe.{next(iter(change))}="):
        describe(dataclasses.replace(model, moe=dataclasses.replace(model.moe, **change)), "mixtral")
    trained = dataclasses.replace(model.moe, load_balance=0.01, jitter=0.1, transport="scatter", capacity_factor=2.0)
    assert describe(dataclasses.replace(model, moe=trained), "mixtral")["num_local_experts"] == 12


PUBLISHED_SIZES = {
    "deepseek_v3": ({
        "hidden_size": 7168, "num_hidden_layers": 61, "num_attention_heads": 128, "num_key_value_heads": 128, "intermediate_size": 18432,
        "moe_intermediate_size": 2048, "n_routed_experts": 256, "n_shared_experts": 1, "n_group": 8, "topk_group": 4,
        "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "vocab_size": 129280,
        "first_k_dense_replace": 3,
    }, 671_026_404_352 + 58 * 256),
    "gpt_oss": ({
        "hidden_size": 2880, "num_hidden_layers": 24, "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 64,
        "vocab_size": 201088, "intermediate_size": 2880, "num_local_experts": 32, "num_experts_per_tok": 4, "experts_per_token": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 12,
    }, 20_914_757_184),
}  # fmt: skip
"""Fields of the released models, and the numbers in their files: parameters, and corrections of selection."""


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED_SIZES)
def test_released_models_have_as_many_numbers(name):
    """Said twice: by our leaves, and by the tensors that rules expect to find."""
    sizes, wanted = PUBLISHED_SIZES[name]
    model = read(name, CONFIGS[name] | sizes)
    ours = leaves(model)
    tensors = outline.shapes(FAMILIES[name].rules(model), ours)
    assert sum(math.prod(leaf.shape) for leaf in ours.values()) == wanted
    assert sum(math.prod(shape) for shape in tensors.values()) == wanted
