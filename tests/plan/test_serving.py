"""Serving by hand: experts of a batch against draws, bytes and seconds of a model of a few thousand parameters on a chip of round numbers,
prices. The chip has 8 kB, reads 1000 bytes and multiplies 1e6 FLOPs a second."""

import dataclasses
import json

import numpy as np
import pytest
from plan.test_published import TABLE, load
from train import small

from moejax.errors import UserError
from moejax.plan import account, costs, dense, hardware, serving
from moejax.plan.hardware import Chip
from moejax.plan.serving import Setting

SMALL = Chip("small", 8000, None, 1e6, 2e6, 1e3, 0, 1.0, 1.0, 1, 1, ("1",))
SETTING = Setting(context=10, batch=4, margin=0.0)
HALVES = {"model.compute_dtype": "bfloat16"}
EXPERT, EXPERTS = 3 * 16 * 8, 8
CACHE = 10 * 2 * 2 * 8
"""Bytes of ten positions: bf16 keys and values of one head of 8."""
SHARED = 16 * 16 * 2 + 16 * 8 * 2 + 16 * 8 + 3 * 16 + 16 * 264
"""Parameters that every token meets and multiplies or scales: mixer, router, norms, output projection; not the embedding."""


@pytest.fixture(scope="module")
def counted():
    """Two of eight experts of width 8 in one layer of width 16."""
    return account.of_config(small.configure(**HALVES))


@pytest.mark.parametrize("experts, chosen, batch", [(8, 2, 5), (16, 1, 16), (6, 3, 2)])
def test_distinct_experts_are_those_of_draws(experts, chosen, batch):
    """20,000 batches drawn: the mean is within five of its own standard errors."""
    rng = np.random.default_rng(0)
    order = rng.random((20_000, batch, experts)).argsort(-1)[..., :chosen]
    met = np.zeros((20_000, experts), bool)
    np.put_along_axis(met, order.reshape(20_000, -1), True, axis=1)
    counts = met.sum(1)
    error = counts.std() / np.sqrt(len(counts))
    assert abs(serving.distinct(experts, chosen, batch) - counts.mean()) < 5 * error


def test_distinct_experts_of_one_token_and_of_many():
    assert [serving.distinct(8, k, 1) for k in (1, 2, 4, 8)] == [1, 2, 4, 8]
    assert serving.distinct(8, 2, 2) == 2 + 2 * 6 / 8
    found = [serving.distinct(128, 8, batch) for batch in range(1, 200)]
    assert found == sorted(found) and 127.9 < found[-1] < 128
    assert serving.distinct(8, 8, 7) == 8


def test_bytes_of_a_step_by_hand(counted):
    one, four = serving.read(counted, SETTING, 1), serving.read(counted, SETTING, 4)
    assert one == (2 * SHARED, 2 * 2 * EXPERT, CACHE)
    assert four.dense == 2 * SHARED and four.caches == 4 * CACHE
    assert four.experts == 2 * EXPERT * EXPERTS * (1 - 0.75**4)
    assert serving.read(counted, SETTING, 1000).experts == pytest.approx(2 * EXPERT * EXPERTS)
    eight = serving.read(counted, SETTING._replace(precision="int8"), 1)
    assert eight.experts == 2 * (EXPERT + 4 * (8 + 8 + 16)) and eight.caches == CACHE


def test_chips_by_hand(counted):
    """Weights and caches fill whole chips; a margin takes its share of each; a device that is half a chip counts half."""
    weights = account.weight_bytes(counted, "bfloat16")
    assert serving.chips(counted, SMALL, SETTING, 4) == -(-(weights + 4 * CACHE) // 8000)
    number = serving.chips(counted, SMALL, SETTING, 4)
    most = serving.largest_batch(counted, SMALL, number, SETTING)
    assert weights + most * CACHE <= 8000 * number < weights + (most + 1) * CACHE
    assert (
        serving.chips(counted, SMALL, SETTING, most) == number == serving.chips(counted, SMALL, SETTING, most + 1) - 1
    )
    assert serving.largest_batch(counted, dataclasses.replace(SMALL, memory=weights // 2), 1, SETTING) == 0
    wide = SETTING._replace(margin=0.5)
    assert serving.chips(counted, SMALL, wide, 4) == -(-(weights + 4 * CACHE) // 4000)
    halves = dataclasses.replace(SMALL, memory=4000, per_chip=2)
    assert serving.chips(counted, halves, SETTING, 4) == number


def test_the_bound_is_the_slower_of_reading_and_multiplying(counted):
    step = serving.decode(counted, SMALL, 2, SETTING, 4)
    assert step.memory == sum(step.read) / 2000
    assert step.matrix == 4 * account.decoding_flops(counted, 10) / 2e6
    assert (step.bound, step.seconds, step.tokens_per_second) == ("HBM", step.memory, 4 / step.memory)
    assert step.bytes_per_token == sum(step.read) / 4
    slow = dataclasses.replace(SMALL, flops=1e3)
    assert serving.decode(counted, slow, 2, SETTING, 4).bound == "FLOPs"


def test_more_sequences_more_tokens_fewer_bytes_each(counted):
    steps = [serving.decode(counted, SMALL, 3, SETTING, batch) for batch in range(1, 100)]
    speeds, each = [s.tokens_per_second for s in steps], [s.bytes_per_token for s in steps]
    assert speeds == sorted(speeds) and each == sorted(each, reverse=True)
    long = [serving.of_account("one", counted, SMALL, SETTING._replace(context=c)).chips for c in (1, 100, 1000)]
    assert long == sorted(long) and long[0] < long[-1]
    bits = [serving.of_account("one", counted, SMALL, SETTING).holdings[i].weights for i in range(3)]
    assert bits == sorted(bits, reverse=True)


def test_a_row_has_the_batches_it_promises(counted):
    row = serving.of_account("one", counted, SMALL, SETTING)
    batches = [step.batch for step in row.steps]
    assert batches[:2] == [1, 4] and batches[-1] == serving.largest_batch(counted, SMALL, row.chips, SETTING)
    assert all(step.chips == row.chips == row.holdings[0].batch for step in row.steps)
    made = json.loads(json.dumps(row.to_dict()))
    assert made["steps"][1]["read"]["dense"] == 2 * SHARED and made["holdings"][0]["precision"] == "bfloat16"


@pytest.mark.parametrize("name", TABLE)
def test_twins_have_the_parameters_they_are_named_for(name):
    counted = account.of_tree(load(name))
    whole, active = dense.equal_total(counted), dense.equal_active(counted)
    assert whole.total_parameters == whole.active_parameters["A"] == counted.total_parameters
    assert active.total_parameters == active.active_parameters["A"] == counted.active_parameters["A"]
    assert not dense.is_sparse(whole) and not dense.is_sparse(active)
    for precision, slack in (("bfloat16", 0), ("int8", 1e-6), ("int4", 1e-6)):
        sizes = [account.weight_bytes(one, precision) for one in (whole, counted)]
        assert sizes[0] == pytest.approx(sizes[1], rel=slack)


def test_a_batch_of_one_reads_as_the_active_twin_and_many_as_the_whole_one():
    """Of a model with further tokens too, whose modules decoding leaves out."""
    counted = account.of_config(small.configure(**HALVES, **{"model.further": 1, "model.moe.shared_hidden": 4}))
    twins = dense.equal_active(counted), dense.equal_total(counted)
    bytes_of = lambda one, batch: sum(serving.read(one, SETTING, batch))  # noqa: E731
    assert bytes_of(counted, 1) == bytes_of(twins[0], 1) < bytes_of(twins[1], 1)
    assert bytes_of(counted, 1000) == pytest.approx(bytes_of(twins[1], 1000))


def test_a_tied_embedding_is_read_and_an_encoder_is_not():
    switch = account.of_tree(load("switch_base_8"))
    step = serving.read(switch, Setting(), 1)
    decoding = [part for part in switch.parts if part.decoding]
    matrix = next(part.multiplied for part in decoding if part.name == "unembedding")
    assert matrix == 768 * 32128
    others = sum(part.active for part in decoding if part.name not in ("embedding", "unembedding"))
    assert step.dense + step.experts == pytest.approx(2 * (others + matrix))


def test_recurrent_state_is_read_and_written():
    nemotron = account.of_tree(load("nemotron_3_nano"))
    fixed = sum(m.layers * m.fixed for m in nemotron.mixings)
    assert fixed > 0
    assert serving.read(nemotron, Setting(), 3).caches == 3 * (account.cache_bytes(nemotron, 8192) + fixed)


def test_prices_by_hand(counted):
    """Two chips at 1.8 an hour cost 0.001 a second."""
    row = serving.of_account("one", counted, SMALL, SETTING)._replace(chips=2)
    found = costs.of_serving(row, chip_price=1.8, api_price=5.0, reached=0.5)
    for step in row.steps:
        assert found.per_million[step.batch] == pytest.approx(1e6 * 0.001 / (0.5 * step.tokens_per_second))
    assert found.break_even.tokens_per_second == pytest.approx(200)
    assert found.break_even.tokens_per_day == pytest.approx(200 * 86400)
    assert found.break_even.utilization == pytest.approx(200 / (0.5 * row.steps[-1].tokens_per_second))
    least = found.per_million[row.steps[-1].batch]
    assert costs.of_serving(row, 1.8, least, 0.5).break_even.utilization == pytest.approx(1)
    assert costs.of_serving(row, 1.8).break_even is None
    assert json.loads(json.dumps(found.to_dict()))["break_even"]["tokens_per_second"] == pytest.approx(200)


def test_tables_say_what_they_assume(counted):
    rows = serving.with_twins("one", counted, SMALL, SETTING)
    assert [row.name for row in rows] == ["one", "dense, equal total", "dense, equal active"]
    text = serving.table(rows)
    assert (
        "Sending between chips is not counted" in text
        and "E * (1 - (1 - k/E)^b)" in text
        and "0% of memory left free" in text
    )
    assert len(serving.with_twins("twin", dense.equal_total(counted), SMALL, SETTING)) == 1
    dear, cheap = (costs.table([costs.of_serving(rows[0], 1.8, price)]) for price in (1e9, 1e-9))
    assert "100% of the decode bound" in dear and "cheaper above" in dear
    assert "never cheaper" in cheap


@pytest.mark.parametrize(
    "act, message",
    [
        (lambda row: costs.of_serving(row, 0.0), "--chip_price=0.0: the price of one chip for an hour, above 0"),
        (
            lambda row: costs.of_serving(row, 1.0, -2.0),
            "--api_price=-2.0: the price of a million tokens elsewhere, above 0",
        ),
        (lambda row: costs.of_serving(row, float("nan")), "--chip_price=nan"),
        (lambda row: costs.of_serving(row, 1.0, reached=1.5), "reached=1.5: the share of the decode bound"),
        (lambda row: serving.check(row.setting._replace(batch=0)), "batch=0: a whole number, at least 1"),
        (lambda row: serving.check(row.setting._replace(context=0)), "context=0: a whole number, at least 1"),
        (lambda row: serving.check(row.setting._replace(margin=1.0)), "margin=1.0: a share of a chip's memory"),
    ],
)
def test_errors_are_one_line_with_the_value(counted, act, message):
    with pytest.raises(UserError) as found:
        act(serving.of_account("one", counted, SMALL, SETTING))
    assert message in str(found.value) and "\n" not in str(found.value)


def test_an_unknown_precision_is_refused(counted):
    with pytest.raises(UserError, match="precision='fp8': choose one of"):
        serving.of_account("one", counted, SMALL, SETTING._replace(precision="fp8"))


@pytest.mark.parametrize("chip", hardware.CHIPS)
def test_every_chip_serves(counted, chip):
    row = serving.of_account("one", counted, hardware.CHIPS[chip])
    assert (row.chips, row.steps[-1].bound in ("HBM", "FLOPs")) == (1, True)
