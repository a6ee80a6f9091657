"""Bounds of a step from hand-made numbers, and how they move with measured loads and with the transport."""

import dataclasses

import numpy as np
import pytest

from moejax import config
from moejax.errors import DamagedError, UserError
from moejax.plan import account, exchange, memory, roofline, skew
from moejax.plan.hardware import parse_topology
from moejax.plan.skew import EVEN

V5P = parse_topology("v5p:2x2x2")


def experiment(mesh=None, **moe):
    """16 experts, 2 a token; 8 devices."""
    moe = config.MoE(**({"transport": "ragged"} | moe))
    return config.Config(model=config.Model(moe=moe), mesh=mesh or config.Mesh(fsdp=2, expert=4))


def compiled(**changes):
    """A step that a compiler might have answered for."""
    row = {"kind": "ragged-all-to-all", "axes": ["expert"], "devices": 4, "times": 1, "bytes": 8e6, "wire": 6e6}
    facts = {
        "fits": True, "devices": 8, "tokens": 2048, "flops": {"total": 459e9},
        "memory": {"arguments": 2_765_000_000, "outputs": 0, "temporaries": 2_765_000_000, "donated": 2_765_000_000}, "collectives": [row],
    }  # fmt: skip
    return facts | changes


def test_every_resource_is_divided_by_its_peak():
    """459 GFLOP at 459 TFLOP/s; arguments read, written, and temporaries written and read: four times 2,765 MB at 2,765 GB/s."""
    found = roofline.of_compiled(compiled(), experiment(), V5P)
    assert found.seconds.matrix == pytest.approx(1e-3)
    assert found.seconds.memory == pytest.approx(4e-3)
    assert found.seconds.network == 0
    assert found.seconds.links == pytest.approx(8e6 / 1.25 * 2 / 4 / 9e10)  # two lines of two, of a buffer 1/1.25 full
    assert (found.seconds.bound, found.seconds.overlapped) == ("memory", found.seconds.memory)
    assert found.seconds.serial == pytest.approx(sum(found.seconds))
    assert found.tokens_per_second == pytest.approx(16 * 128 / 4e-3)


def test_what_a_program_sends_between_slices_goes_over_the_network():
    """50 MB of a chip of v5p at 6.25 GB/s; the same within a slice over its links."""
    cfg, network = experiment(config.Mesh(data=4, fsdp=4)), V5P.chip.network
    row = {"kind": "all-reduce", "axes": ["data"], "times": 1, "bytes": 5e7, "wire": 5e7, "devices": 2}
    between, within = (
        roofline.of_compiled(compiled(collectives=[row | {"network": said}], devices=16), cfg, V5P, slices=2).seconds
        for said in (True, False)
    )
    assert (between.links, between.network) == (0, pytest.approx(5e7 / network))
    assert within.network == 0 < within.links < between.network


def test_utilisation_is_model_flops_over_peak():
    cfg = experiment()
    found = roofline.of_compiled(compiled(), cfg, V5P)
    useful = account.training_flops(account.of_config(cfg), 128) * 16 * 128
    assert found.model_flops == useful
    assert found.flops_utilization == pytest.approx(useful / (8 * 4e-3 * 459e12))
    assert found.executed.total == pytest.approx(8 * 459e9 / useful)
    assert found.executed.total == pytest.approx(
        1 + found.executed.masked + found.executed.buffers + found.executed.rest
    )


def test_masked_scores_are_counted():
    """Of T * T pairs causal attention sees T (T + 1) / 2; forward and backward, 4 heads of 16 in 4 layers."""
    cfg = experiment()
    masked = roofline.masked_flops(account.of_config(cfg), cfg, "train")
    assert masked == 3 * 16 * 4 * (4 * 4 * 16) * (128 * 128 - 128 * 129 // 2)
    assert roofline.masked_flops(account.of_config(cfg), cfg, "decode") == 0


def test_buffers_of_a_capacity_are_counted():
    """Twice the fair share computes every routed row twice; the one-hot products come on top."""
    even, scatter = experiment(), experiment(transport="scatter", capacity_factor=2.0)
    counted = account.of_config(even)
    experts = roofline.expert_flops(counted, even, "train")
    assert experts == 3 * 2 * 16 * 128 * 4 * 2 * (3 * 64 * 96)
    assert roofline.buffer_flops(counted, even, "train") == 0
    assert roofline.buffer_flops(counted, scatter, "train") == experts
    einsum = exchange.using(scatter, "einsum")
    masks = 3 * 4 * 16 * 128 * 2 * 2 * (16 * 32) * 64
    assert roofline.buffer_flops(counted, einsum, "train") == experts + masks


def test_a_step_that_does_not_fit_has_no_bounds():
    with pytest.raises(UserError, match="96.1 GB of 95.7 GB"):
        roofline.of_compiled({"fits": False, "memory": {"used": 96.1e9, "room": 95.7e9}}, experiment(), V5P)


def loads(*rows):
    return np.asarray(rows, np.int64)


def test_even_loads_change_nothing():
    assert skew.skew(loads([5] * 16, [7] * 16), experiment()) == EVEN


def test_loads_of_blocks_of_experts_add_up():
    """Experts 0 to 3 lie on the first of 4 devices. Layer 0: they get half of 32 requests, twice their share; layer 1: everything."""
    half, everything = [4] * 4 + [0] * 4 + [2] * 8, [8] * 4 + [0] * 12
    found = skew.skew(loads(half, everything), experiment(receive_buffer=2.0))
    assert (found.slowest, found.worst, found.hottest, found.rounds) == (3.0, 4.0, 4.0, 1.5)


def test_a_hot_expert_drops_what_exceeds_its_places():
    """One expert gets 10 of 40 requests, four times its share of 2.5; with 2 shares of places 5 are dropped."""
    found = skew.skew(loads([10] + [2] * 15), experiment(transport="scatter", capacity_factor=2.0))
    assert (found.dropped, found.rounds, found.hottest) == (5 / 40, 1.0, 4.0)


def test_devices_have_a_part_of_every_class_of_widths():
    """With two classes device 0 of 4 holds experts 0, 1, 8 and 9."""
    cfg = experiment(hidden_classes=(64, 128))
    first = loads([1, 1] + [0] * 6 + [1, 1] + [0] * 6)
    assert skew.skew(first, cfg).slowest == 4 and skew.skew(loads([1] * 4 + [0] * 12), cfg).slowest == 2


def test_zero_experts_are_not_counted():
    cfg = experiment(zero_experts=("zero",))
    assert skew.skew(loads([3] * 16 + [90]), cfg) == EVEN


@pytest.mark.parametrize("bad", [np.ones((2, 8), int), np.zeros((1, 16), int)])
def test_loads_of_another_model_are_refused(bad):
    with pytest.raises(UserError, match="num_experts=16"):
        skew.skew(bad, experiment())


def test_loads_are_read_from_a_run(tmp_path):
    file = tmp_path / "00000200.npz"
    np.savez(file, **{"sparse.requests": np.arange(32).reshape(2, 16), "sparse.load": np.zeros((2, 16))})
    assert skew.read(file).tolist() == np.arange(32).reshape(2, 16).tolist()
    np.savez(file, **{"sparse.load": np.zeros((2, 16))})
    with pytest.raises(UserError, match="no loads"):
        skew.read(file)
    file.write_bytes(b"x")
    with pytest.raises(DamagedError, match="cannot be read"):
        skew.read(file)


def test_time_rises_with_skew():
    """Products of experts and the exchange take longer; capacity buffers are as large whatever comes."""
    found = [
        roofline.of_compiled(compiled(), experiment(), V5P, load=EVEN._replace(slowest=s)).seconds
        for s in (1.0, 2.0, 3.0)
    ]
    assert found[0].matrix < found[1].matrix < found[2].matrix
    assert found[2].links == pytest.approx(3 * found[0].links)
    scatter = experiment(transport="scatter", capacity_factor=2.0)
    even, uneven = (roofline.of_compiled(compiled(), scatter, V5P, load=EVEN._replace(slowest=s)) for s in (1.0, 3.0))
    assert even == uneven


def test_every_allowed_transport_is_compared():
    """Without a capacity two are; with one all four. The cheapest comes first."""
    two = exchange.compare(experiment(), V5P)
    four = exchange.compare(experiment(capacity_factor=1.25), V5P)
    assert {c.transport for c in two} == {"gather", "ragged"} and len(four) == 4
    assert [c.seconds for c in four] == sorted(c.seconds for c in four)
    assert {c.transport for c in exchange.compare(experiment(capacity_factor=1.25), V5P, step="decode")} == {
        "gather",
        "ragged",
    }


def test_bytes_of_every_transport():
    """16 rows of 128 positions on 8 devices: 256 tokens of 64 numbers of 4 bytes each, to 4 devices with experts, policy none.

    gather: tokens of 4 devices, 262,144 bytes, of which 3/4 come from others, twice forward and twice backward.
    ragged: 2 * 256 rows in a buffer of 1.25, 163,840 bytes, four crossings. scatter: the same places, 1.25 * 2 a token.
    """
    sent = {c.transport: c.sent for c in exchange.compare(experiment(capacity_factor=1.25), V5P)}
    assert sent["gather"] == 4 * 3 / 4 * 4 * 256 * 256
    assert sent["ragged"] == sent["scatter"] == sent["einsum"] == 4 * 3 / 4 * 640 * 256


def test_gathering_pays_where_tokens_choose_many():
    """Rows of top_k = 8 are eight tokens; over two devices gathering sends two."""
    cfg = experiment(config.Mesh(fsdp=4, expert=2), top_k=8)
    assert exchange.compare(cfg, V5P)[0].transport == "gather"
    wide = dataclasses.replace(cfg, mesh=config.Mesh(expert=64), data=config.Data(batch=512))
    wide = dataclasses.replace(
        wide, model=dataclasses.replace(wide.model, moe=config.MoE(num_experts=64, top_k=2, transport="ragged"))
    )
    assert exchange.compare(wide, parse_topology("v5p:4x4x4"))[0].transport == "ragged"


def test_rows_that_pad_the_batch_are_sent():
    cfg = dataclasses.replace(experiment(), data=config.Data(batch=9))
    assert memory.rows(cfg) == 16 and exchange.local_tokens(cfg, "train") == 16 * 128 / 8
