"""Layers that are counted alone: FLOPs, caches and state by hand on small widths, and what a wrong section says."""

import dataclasses

import pytest
from train import small

from moejax import config
from moejax.config_attention import Latent
from moejax.errors import ConfigError
from moejax.plan import account

D, V = 16, 264
ENDS = D * V
"""Weights of the output projection."""


def count(counted, **model):
    """The account of the small model with these options and sections; its width is 16, with 2 heads of 8 and one of keys."""
    cfg = small.configure()
    tree = config.to_tree(dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, **model)))
    tree.counted = counted
    return account.of_tree(tree)


def test_gated_delta():
    """2 key heads and 4 of values of 3: 24 columns of queries, keys and values; a state of 4 matrices 3 by 3."""
    sections = {"gated_delta": {"key_heads": 2, "value_heads": 4, "head": 3, "conv": 4}}
    counted = count(sections, pattern=("gated_delta",))
    weights = D * (24 + 12 + 4 + 4) + 12 * D
    assert account.weight_flops(counted) == 2 * (weights + ENDS)
    assert counted.total_parameters == weights + 24 * 4 + 4 + 4 + 3 + 2 * D + 2 * ENDS
    assert account.score_flops(counted, 5) == account.score_flops(counted, 50) == 2 * 4 * 24 + 6 * 36
    assert account.decoding_flops(counted, 7) == account.model_flops(counted, 7)
    assert (account.cache_bytes_per_token(counted), account.state_bytes(counted)) == (0, 4 * 36 + 4 * 3 * 24)


def test_mamba2():
    """4 heads of 3, 2 groups, a state of 5: 12 inner columns, 32 through the convolution."""
    counted = count({"mamba2": {"heads": 4, "head": 3, "groups": 2, "state": 5, "conv": 4}}, pattern=("mamba2",))
    weights = D * (12 + 32 + 4) + 12 * D
    assert account.weight_flops(counted) == 2 * (weights + ENDS)
    assert counted.total_parameters == weights + 5 * 32 + 3 * 4 + 12 + 2 * D + 2 * ENDS
    assert account.score_flops(counted, 5) == 2 * 4 * 32 + 4 * 60
    assert account.state_bytes(counted) == 4 * 60 + 4 * 3 * 32


def test_a_gate_is_a_matrix_more():
    gated, plain = (
        count(sections, pattern=(f"{name}+dense",), repeats=3)
        for name, sections in (("gated_attention", {"gated_attention": {}}), ("attention", {}))
    )
    assert gated.total_parameters == plain.total_parameters + 3 * D * 16
    assert gated.mixings == plain.mixings
    assert plain == account.of_config(
        dataclasses.replace(small.configure().model, pattern=("attention+dense",), repeats=3)
    )


def test_the_indexer_sees_all_and_attention_the_best():
    latent = Latent(query_rank=4, rank=6, nope=5, rope=2, value=3)
    sections = {"indexed": {"heads": 3, "width": 4, "top": 2}, "reusing": {"top": 2}}
    counted = count(sections, pattern=("indexed+dense", "reusing+dense"), latent=latent)
    without = account.of_config(
        dataclasses.replace(small.configure().model, pattern=("latent+dense",) * 2, latent=latent)
    )
    assert counted.total_parameters == without.total_parameters + 4 * 12 + D * 4 + D * 3 + 2 * 4
    indexer, attention = 3 * 2 * (4 + 1), 2 * 2 * (5 + 2 + 3)
    weights = account.weight_flops(counted)
    assert account.decoding_flops(counted, 9) == weights + 9 * indexer + 2 * 2 * attention
    assert account.score_flops(counted, 3) == (6 * indexer + 2 * 5 * attention) / 3
    assert account.cache_bytes_per_token(counted) == 4 * (2 * (6 + 2) + 4)


def test_experts_beside_a_shared_one_without_a_gate():
    moe = dataclasses.replace(small.configure().model.moe, activation="relu2", latent=6)
    counted = count({"sparse_plain_shared": {"hidden": 7}}, pattern=("sparse_plain_shared",), moe=moe)
    found = {part.name: part for part in counted.parts}
    assert found["shared"].parameters == 2 * D * 7
    assert (found["experts"].parameters, found["experts"].active) == (8 * 2 * 6 * 8, 2 * 2 * 6 * 8)
    assert found["latent"].parameters == 2 * D * 6 and found["norms"].parameters == 2 * D


def test_encoder_and_decoder():
    """A token is one of the source and one of the target; decoding finds the source in its cache and reads no encoder."""
    sections = {
        "encoder": {"pattern": ("attention+plain",), "repeats": 2}, "cross": {}, "plain": {"hidden": 5},
        "relative_bias": {"buckets": 3}, "tied": {},
    }  # fmt: skip
    counted = count(sections, pattern=("attention+cross+plain",), repeats=1)
    attention, plain, pair = D * 16 * 2 + D * 8 * 2, 2 * D * 5, 4 * 2 * 8
    assert counted.total_parameters == 4 * attention + 3 * plain + 2 * 3 * 2 + (4 + 1 + 3 + 1) * D + ENDS
    actives = counted.active_parameters
    assert actives["A"] - ENDS == actives["B"] == actives["C"]
    assert account.weight_flops(counted) == 2 * (4 * attention + 3 * plain + ENDS)
    assert account.score_flops(counted, 9) == pair * (2 * 9 + 9 + 5)
    of_token = 2 * attention - 2 * D * 8 + plain + ENDS
    assert account.decoding_flops(counted, 9) == 2 * of_token + pair * (9 + 9)
    assert account.cache_bytes_per_token(counted) == 2 * 4 * 2 * 8


@pytest.mark.parametrize(
    "sections, model, message",
    [
        ({"mamba3": {}}, {}, "config.counted.mamba3 is not counted; choose from gated_delta, .*, tied"),
        ({"plain": {"width": 3}}, {"pattern": ("plain",)}, "config.counted.plain has width; it takes hidden"),
        (
            {"plain": {"hidden": 2.5}},
            {"pattern": ("plain",)},
            "config.counted.plain.hidden=2.5: a whole number, at least 1",
        ),
        ({"tied": {"x": 1}}, {}, "config.counted.tied has x; it takes nothing"),
        ({"plain": {"hidden": 3}}, {}, "config.counted.plain is in no layer"),
        ({"tied": {}}, {"pattern": ("conv+dense",)}, "has 'conv': it is neither built .* nor a section"),
        ({"tied": {}}, {"further": 1}, "model.further=1 of an architecture that is counted"),
    ],
)
def test_errors_say_what_to_change(sections, model, message):
    with pytest.raises(ConfigError, match=message):
        count(sections, **model)
