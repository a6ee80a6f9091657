"""Bytes of one device without devices: arguments against the programs' own shapes, padding against what the compiler measured."""

import dataclasses

import jax
import pytest

from moejax import config, mesh
from moejax.plan import memory, programs, temporaries

GB = 10**9


def experiment(on=None, **model):
    data = config.Data(batch=16, context=128)
    return config.Config(model=config.Model(**model), mesh=on or config.Mesh(), data=data)


LAYERS = {"first": ("latent+dense",), "pattern": ("attention+sparse", "local+dense"), "repeats": 2, "further": 1}
LATENT = config.MoE(latent=32, shared_hidden=32, transport="ragged")
MESHES = {
    "one": config.Mesh(),
    "experts": config.Mesh(fsdp=2, expert=4),
    "widths": config.Mesh(data=2, expert=2, tensor=2),
    "positions": config.Mesh(fsdp=2, expert=2, context=2),
}


@pytest.mark.parametrize("step", programs.STEPS)
@pytest.mark.parametrize("on", MESHES)
def test_arguments_are_those_of_the_program(on, step):
    """To the byte, for whatever is built of dense, sparse, latent and further layers."""
    cfg = experiment(MESHES[on], **LAYERS, moe=LATENT)
    if step in memory.SERVING and cfg.mesh.context > 1:
        pytest.skip("decoding does not cut positions")
    on = mesh.make(
        cfg.mesh, jax.devices()[: cfg.mesh.data * cfg.mesh.fsdp * cfg.mesh.expert * cfg.mesh.tensor * cfg.mesh.context]
    )
    with jax.set_mesh(on):
        program = programs.build(step, cfg, on)
    assert memory.plain_bytes(cfg, step) == programs.bytes_of(program)


MEASURED = [
    (("float32", ()), 512), (("float32", (100,)), 512), (("float32", (1000,)), 4096), (("float32", (1000, 100)), 425984),
    (("float32", (3, 100)), 2048), (("float32", (4, 7, 100)), 14336), (("float32", (64, 4, 16)), 32768), (("float32", (64, 3, 40)), 61440),
    (("float32", (100, 1)), 512), (("float32", (4, 2000, 16)), 524288), (("float32", (16, 2, 3, 5)), 15360),
    (("float32", (9, 300, 2, 130)), 3594240), (("bfloat16", (100,)), 512), (("bfloat16", (1000, 100)), 212992),
    (("bfloat16", (1, 100)), 512), (("bfloat16", (5, 100)), 2048), (("bfloat16", (64, 3, 40)), 30720), (("int32", (16, 64)), 8192),
    (("bool", (16, 64)), 2048), (("int8", (100, 200)), 25600), (("int8", (3, 200)), 1024),
]  # fmt: skip
"""Type and shape of a lone argument, and its size in memory_analysis() of the compiler of jax 0.10.2 for v5p:2x2x1."""


@pytest.mark.parametrize("array, measured", MEASURED)
def test_padding_is_the_compilers(array, measured):
    dtype, shape = array
    assert memory.padded_bytes(shape, dtype) == measured


def test_kinds_are_told_apart():
    """AdamW keeps two moments of every weight; a batch has six arrays; nothing of it is in what decoding takes."""
    train, decode = memory.arguments(experiment()), memory.arguments(experiment(), "decode")
    assert 0 <= train["optimizer"] - 2 * train["weights"] < 4096
    assert train["batch"] == 4 * 16 * 128 * 4 + 16 * 128 + 512 + 16 * 128 * 4 - 16 * 128 * 4
    assert decode["cache"] > 4 * 2 * 16 * 128 * 32 * 4 and "optimizer" not in decode


def test_parameters_are_served_in_the_compute_type():
    served = memory.arguments(experiment(width=256, compute_dtype="bfloat16"), "decode")["weights"]
    assert served < 0.6 * memory.arguments(experiment(width=256, compute_dtype="bfloat16"))["weights"]


def test_an_unknown_step_is_an_error():
    with pytest.raises(ValueError, match="train, eval, prefill, decode"):
        memory.arguments(experiment(), "sleep")


def test_more_shards_take_less():
    cfg = experiment(width=1024)
    sizes = [sum(memory.arguments(dataclasses.replace(cfg, mesh=config.Mesh(fsdp=n))).values()) for n in (1, 2, 4, 8)]
    assert sizes == sorted(sizes, reverse=True)


def test_policies_save_more_from_full_to_none():
    saved = [temporaries.estimate(experiment(remat=name)).saved for name in ("full", "exchanged", "selective", "none")]
    assert saved == sorted(saved) and saved[0] < saved[1] < saved[2] < saved[3]


def test_microbatches_hold_less_and_keep_a_sum():
    """A quarter of the batch at a time; gradients of one are added to those of all before, which makes three."""
    cfg = experiment(remat="full")
    four = dataclasses.replace(cfg, train=config.Train(microbatches=4))
    one, parts = temporaries.estimate(cfg), temporaries.estimate(four)
    assert parts.gradients == 3 * one.gradients
    assert parts.saved == pytest.approx(one.saved / 4, rel=0.01) and parts.working < one.working


@pytest.mark.parametrize("transport, factor", [("gather", None), ("ragged", None), ("scatter", 1.25), ("einsum", 1.25)])
def test_every_transport_has_an_estimate(transport, factor):
    """Rows of experts make the working set of a wide sparse layer; a longer batch has more of them."""
    moe = config.MoE(transport=transport, capacity_factor=factor, top_k=4, hidden=512)
    short, long = (experiment(moe=moe, loss_chunk=8) for _ in range(2))
    long = dataclasses.replace(long, data=config.Data(batch=64, context=128))
    assert 0 < temporaries.estimate(short).working < temporaries.estimate(long).working


def test_forward_steps_keep_nothing():
    for step in ("eval", "prefill", "decode"):
        found = temporaries.estimate(experiment(), step)
        assert found.gradients == found.saved == 0 < found.working == found.total
