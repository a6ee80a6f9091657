"""What is counted from shapes against what the TPU compiler made of the same steps: collectives, arguments, temporaries."""

import dataclasses

import pytest

from moejax import config
from moejax.plan import account, memory, temporaries, traffic

MoE = config.MoE(num_experts=32, top_k=4, hidden=512, transport="ragged")
MODEL = config.Model(
    vocab_size=16384, width=1024, repeats=4, heads=8, kv_heads=4, head_dim=128, hidden=2048, compute_dtype="bfloat16", remat="full",
    loss_chunk=2048, moe=MoE,
)  # fmt: skip
CFG = config.Config(model=MODEL, data=config.Data(context=1024, batch=32), mesh=config.Mesh(fsdp=2, expert=4))


def changed(on=None, transport="ragged", factor=None, **model):
    moe = dataclasses.replace(MoE, transport=transport, capacity_factor=factor)
    return dataclasses.replace(CFG, model=dataclasses.replace(MODEL, moe=moe, **model), mesh=on or CFG.mesh)


CASES = {
    "full": changed(),
    "none": changed(remat="none"),
    "selective": changed(remat="selective"),
    "gather": changed(transport="gather"),
    "scatter": changed(transport="scatter", factor=1.25),
    "microbatches": dataclasses.replace(CFG, train=config.Train(microbatches=4)),
    "positions": changed(config.Mesh(expert=4, context=2)),
    "dense": changed(config.Mesh(fsdp=8), pattern=("attention+dense",)),
}
GATHERS, SUM, EXCHANGE = ("all-gather", "fsdp"), ("all-reduce", "fsdp+expert"), ("ragged-all-to-all", "expert")
EXPERTS = {("reduce-scatter", "fsdp"): 100.7, SUM: 221.2}
TWICE = EXPERTS | {GATHERS: 100.7, ("all-gather", "fsdp+expert"): 103.7}
COMPILED = {
    "full": TWICE | {EXCHANGE: 755.0},
    "selective": TWICE | {EXCHANGE: 755.0},
    "none": EXPERTS | {GATHERS: 50.3, ("all-gather", "fsdp+expert"): 81.2, EXCHANGE: 503.3},
    "gather": TWICE | {("all-gather", "expert"): 408.4, ("reduce-scatter", "expert"): 306.7},
    "scatter": TWICE | {("all-to-all", "expert"): 755.0},
    "microbatches": {
        GATHERS: 604.0,
        ("all-gather", "fsdp+expert"): 328.5,
        SUM: 884.7,
        ("reduce-scatter", "fsdp"): 402.7,
        EXCHANGE: 1006.6,
    },
    "positions": {
        ("all-gather", "context"): 71.3,
        ("all-gather", "expert"): 88.9,
        ("all-reduce", "context"): 201.3,
        ("all-reduce", "expert+context"): 221.2,
        EXCHANGE: 755.0,
        ("reduce-scatter", "context"): 35.7,
    },
    "dense": {GATHERS: 190.8, ("all-reduce", "fsdp"): 308.3},
}
"""Megabytes that a device sends in a step by kind and axes, those above 4, of `plan.compiling` with jax 0.10.2 for v5p:2x2x2."""
SIZES = {
    "full": (371563008, 1597031040),
    "selective": (371563008, 2538426368),
    "none": (371563008, 3359767648),
    "gather": (371563008, 2424366208),
    "scatter": (371563008, 992965312),
    "microbatches": (371563008, 992256928),
    "positions": (742955520, 1869475072),
    "dense": (107123200, 548008704),
}
"""Bytes of arguments and of temporaries of the same steps."""
UNREAD = 16384 + 512
"""Bytes of labels and row_ids, which these steps do not read, so that they are no arguments of the compiled program."""


def sent(cfg):
    """Megabytes by kind and axes."""
    found = {}
    for row in traffic.rows(cfg):
        key = row["kind"], "+".join(row["axes"])
        found[key] = found.get(key, 0) + row["wire"] / 1e6
    return {key: wire for key, wire in found.items() if wire > 4}


@pytest.mark.parametrize("name", CASES)
def test_collectives_are_those_of_the_compiler(name):
    """Each within 2 % or what is left out as small, and none besides."""
    assert sent(CASES[name]) == pytest.approx(COMPILED[name], rel=0.02, abs=4.5)


@pytest.mark.parametrize("name", CASES)
def test_sizes_are_those_of_the_compiler(name):
    """Arguments to the byte, temporaries within the margin of the estimate."""
    arguments, made = SIZES[name]
    assert sum(memory.arguments(CASES[name]).values()) - UNREAD == arguments
    estimate = temporaries.estimate(CASES[name]).total
    assert (1 - temporaries.MARGIN) * estimate < made < (1 + temporaries.MARGIN) * estimate


def test_policies_compute_more_from_none_to_full():
    """Twice the products of a forward pass at most again."""
    counted = account.of_config(CFG)
    none, selective, full = (traffic.executed_flops(counted, CASES[name]) for name in ("none", "selective", "full"))
    assert none < selective < full < 1.34 * none
    assert traffic.executed_flops(counted, changed(query_chunk=128)) > full


def test_rows_that_pad_the_batch_are_computed():
    counted, padded = account.of_config(CFG), dataclasses.replace(CFG, data=config.Data(context=1024, batch=4))
    assert memory.rows(padded) == 8
    assert traffic.executed_flops(counted, padded) == pytest.approx(traffic.executed_flops(counted, CFG) / 4)


def test_one_device_sends_nothing():
    assert traffic.rows(changed(config.Mesh())) == []


def test_cut_widths_are_summed():
    """Four mixers forward, backward and again; experts' outputs in fp32 and their gradients; the loss. Compiled: 421.0 MB."""
    cfg = changed(config.Mesh(expert=4, tensor=2))
    vectors = 32 * 1024 / 4 * 1024 * 2
    assert sent(cfg)["all-reduce", "tensor"] == pytest.approx((4 * 3 + 4 * 2 + 4 + 1) * vectors / 1e6)
    assert sent(cfg)["all-reduce", "tensor"] == pytest.approx(421.0, rel=0.01)
    whole = dataclasses.replace(cfg.model.moe, tensor="experts")
    whole = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, moe=whole))
    assert sent(whole)["all-gather", "tensor"] == pytest.approx(2 * 4 * vectors / 2 / 1e6)


def test_keys_of_cut_positions_are_gathered():
    """In four layers forward and again, of 4 heads of 128."""
    cfg = changed(config.Mesh(fsdp=4, context=2), pattern=("attention+dense",))
    keys = 4 * 32 * 1024 / 4 * (2 * 4 * 128) * 2
    assert sent(cfg)["all-gather", "context"] == pytest.approx(2 * keys / 2 / 1e6)
