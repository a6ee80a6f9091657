"""What a step sends and computes, counted from shapes, against figures by hand. tests/aot/test_plan.py has the compiler's."""

import dataclasses

import pytest

from moejax import config
from moejax.plan import account, memory, traffic

MoE = config.MoE(num_experts=32, top_k=4, hidden=512, transport="ragged")
MODEL = config.Model(
    vocab_size=16384, width=1024, repeats=4, heads=8, kv_heads=4, head_dim=128, hidden=2048, compute_dtype="bfloat16", remat="full",
    loss_chunk=2048, moe=MoE,
)  # fmt: skip
CFG = config.Config(model=MODEL, data=config.Data(context=1024, batch=32), mesh=config.Mesh(fsdp=2, expert=4))


def changed(on=None, transport="ragged", factor=None, **model):
    moe = dataclasses.replace(MoE, transport=transport, capacity_factor=factor)
    return dataclasses.replace(CFG, model=dataclasses.replace(MODEL, moe=moe, **model), mesh=on or CFG.mesh)


def sent(cfg):
    """Megabytes by kind and axes."""
    found = {}
    for row in traffic.rows(cfg):
        key = row["kind"], "+".join(row["axes"])
        found[key] = found.get(key, 0) + row["wire"] / 1e6
    return {key: wire for key, wire in found.items() if wire > 4}


DENSE = {"pattern": ("attention+dense",)}
VECTORS = 32 * 1024 * 1024 * 2
"""Bytes of the residual stream of the batch."""
ATTENTION, MLP, TABLE = 1024 * (8 + 4 + 4 + 8) * 128, 3 * 1024 * 2048, 16384 * 1024
"""Parameters of a layer's mixer and dense channel, and of the unembedding or the embedding."""


def test_dense_weights_are_gathered_axis_by_axis():
    """In bf16, four layers forward and again, the unembedding forward and backward whatever is saved; first over expert, of which an fsdp
    part is there. Gradients go back in fp32 once."""
    whole = 4 * (ATTENTION + MLP) + TABLE
    both = sent(changed(config.Mesh(fsdp=2, expert=4), **DENSE))
    assert both["all-gather", "fsdp"] == pytest.approx(2 * 2 * whole / 2 / 1e6)
    assert both["all-gather", "expert"] == pytest.approx(2 * 2 * whole / 2 * 3 / 4 / 1e6)
    assert both["reduce-scatter", "fsdp"] == pytest.approx(4 * whole / 2 / 1e6)
    assert both["reduce-scatter", "expert"] == pytest.approx(4 * whole / 2 * 3 / 4 / 1e6)
    saved = sent(changed(config.Mesh(fsdp=8), remat="none", **DENSE))
    assert saved["all-gather", "fsdp"] == pytest.approx(2 * (whole + TABLE) * 7 / 8 / 1e6)


def test_gradients_are_summed_in_pieces():
    """Over the other axes that tokens lie over, each device what it stores: the embedding too, which is not gathered."""
    found = sent(changed(config.Mesh(data=2, fsdp=2, context=2), **DENSE))
    pieces = (4 * (ATTENTION + MLP) + 2 * TABLE) / 2
    assert found["all-reduce", "data+context"] == pytest.approx(2 * 3 / 4 * 4 * pieces / 1e6)


def test_tokens_are_looked_up_where_their_columns_lie():
    """Their vectors come and gradients go back, in every microbatch; with several, one forward pass counts first."""
    once, parts = changed(config.Mesh(fsdp=2, expert=4)), config.Train(microbatches=4)
    assert sent(once)["all-to-all", "fsdp+expert"] == pytest.approx(2 * VECTORS / 8 * 7 / 8 / 1e6)
    several = sent(dataclasses.replace(once, train=parts))
    assert several["all-to-all", "fsdp+expert"] == pytest.approx(3 * VECTORS / 8 * 7 / 8 / 1e6)


def test_experts_are_gathered_and_their_gradients_cut():
    """Over fsdp alone: forward and again in bf16, back in fp32. Where fsdp is one device they stay where they are."""
    dense = sent(changed(config.Mesh(fsdp=2, expert=4), **DENSE))
    experts = 4 * 8 * 3 * 1024 * 512
    found = sent(changed(config.Mesh(fsdp=2, expert=4)))
    assert found["reduce-scatter", "fsdp"] - dense["reduce-scatter", "fsdp"] == pytest.approx(
        4 * (experts - 4 * MLP) / 2 / 1e6, rel=0.01
    )
    assert ("all-gather", "fsdp") not in sent(changed(config.Mesh(expert=8)))


def test_a_cut_vocabulary_is_gathered_in_parts():
    """Each half of tensor gathers its half of the columns; the gradient goes home to where all columns are stored."""
    one, two = (changed(config.Mesh(fsdp=2, tensor=n), **DENSE) for n in (1, 2))
    halved = (4 * (ATTENTION + MLP) + TABLE) / 2
    assert sent(two)["all-gather", "fsdp"] == pytest.approx(2 * 2 * halved / 2 / 1e6)
    assert sent(one)["all-gather", "fsdp"] == pytest.approx(2 * sent(two)["all-gather", "fsdp"])
    assert sent(two)["all-gather", "tensor"] == pytest.approx(4 * TABLE / 2 / 2 / 1e6)


def test_policies_compute_more_from_none_to_full():
    """Twice the products of a forward pass at most again."""
    counted = account.of_config(CFG)
    none, selective, full = (
        traffic.executed_flops(counted, changed(remat=name)) for name in ("none", "selective", "full")
    )
    assert none < selective < full < 1.34 * none
    assert traffic.executed_flops(counted, changed(query_chunk=128)) > full


def test_rows_that_pad_the_batch_are_computed():
    counted, padded = account.of_config(CFG), dataclasses.replace(CFG, data=config.Data(context=1024, batch=4))
    assert memory.rows(padded) == 8
    assert traffic.executed_flops(counted, padded) == pytest.approx(traffic.executed_flops(counted, CFG) / 4)


def test_one_device_sends_nothing():
    assert traffic.rows(changed(config.Mesh())) == []


def test_cut_widths_are_summed():
    """Four mixers forward, backward and again; experts' outputs in fp32 and their gradients; the loss."""
    cfg = changed(config.Mesh(expert=4, tensor=2))
    vectors = 32 * 1024 / 4 * 1024 * 2
    assert sent(cfg)["all-reduce", "tensor"] == pytest.approx((4 * 3 + 4 * 2 + 4 + 1) * vectors / 1e6)
    whole = dataclasses.replace(cfg.model.moe, tensor="experts")
    whole = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, moe=whole))
    gradient = 4 * TABLE / 4 / 2  # of the unembedding
    assert sent(whole)["all-gather", "tensor"] == pytest.approx((2 * 4 * vectors / 2 + gradient) / 1e6)


def test_keys_of_cut_positions_are_gathered():
    """In four layers forward and again, of 4 heads of 128."""
    cfg = changed(config.Mesh(fsdp=4, context=2), pattern=("attention+dense",))
    keys = 4 * 32 * 1024 / 4 * (2 * 4 * 128) * 2
    assert sent(cfg)["all-gather", "context"] == pytest.approx(2 * keys / 2 / 1e6)
