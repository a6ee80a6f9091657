"""Tile sizes: the caller's, the measured, the rule's; and the search that measures them."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.pallas import tpu as pltpu

from moejax import compat
from moejax.bench import calls, tune
from moejax.bench.shapes import Shape
from moejax.kernels import tuned
from moejax.kernels.chips import CHIPS
from moejax.kernels.grouped_matmul import pallas_gpu, pallas_tpu, tiling

SHAPE = Shape(300, 128, 256, 4)
KERNELS = {"v5p": pallas_tpu, "h200": pallas_gpu}


def chosen(chip, name, shape=SHAPE, **options):
    """(problem, tiles) of one call, traced."""
    spec = CHIPS[chip]
    function = calls.function(KERNELS[chip], shape, name, spec, interpret=True, **options)
    given = calls.arguments(shape, name, tune._shape)
    index = jax.ShapeDtypeStruct((shape.experts,), jnp.int32), jax.ShapeDtypeStruct((), jnp.int32)
    with tuned.watched() as seen:
        jax.eval_shape(function, given, *index)
    assert len(seen) == 1
    return seen[0]


@pytest.mark.parametrize("chip", KERNELS)
def test_every_call_has_a_problem_of_its_own(chip):
    """Neither an int8 layer nor two pairs nor another kernel of equal sizes take each other's tiles."""
    names = calls.FUNCTIONS[CHIPS[chip].platform]
    shape = Shape(304, 256, 256, 4)
    problems = {name: chosen(chip, name, shape)[0] for name in names}
    assert len({p for name, p in problems.items() if name != "dw down"}) == len(names) - 1
    assert problems["dw down"] == problems["dw up"]  # both [256, 256] of 304 rows
    assert {p.chip for p in problems.values()} == {chip}
    assert {p.rows_per_group for p in problems.values()} == {64}


@pytest.mark.parametrize("chip", KERNELS)
def test_the_table_is_asked_and_the_rule_answers_the_rest(chip, monkeypatch):
    """An entry is taken by its very problem, a caller's own tiles come before it, and a shape with none gets the rule."""
    shape = Shape(304, 128, 256, 4)
    asked, rule = chosen(chip, "down", shape)
    other = next(t for t in KERNELS[chip].neighbours(rule) if t != rule)
    line = tuned.entry(asked, other, ms=1.0, rule_ms=2.0)
    monkeypatch.setattr(tuned, "table", lambda: {tuned.key(line): line["tiles"]})
    assert chosen(chip, "down", shape)[1] == other
    assert chosen(chip, "down", shape, tiles=rule)[1] == rule
    assert chosen(chip, "down", Shape(8000, 128, 256, 4))[1] != other
    assert chosen(chip, "dw up", shape)[0] != asked


def test_the_table_that_is_shipped():
    """Every entry is of a known chip and of tiles that its kernels could have; measured, and no slower than the rule."""
    for line in json.loads(tuned.TABLE.read_text()):
        chip = CHIPS[line["chip"]]
        tiles = {"tpu": pallas_tpu, "gpu": pallas_gpu}[chip.platform].Tiles(**line["tiles"])
        assert tiles and tuned.key(line).rows_per_group & (tuned.key(line).rows_per_group - 1) == 0
        assert line["ms"] <= line["rule_ms"]


def test_merge_and_write(tmp_path):
    """The new entry of a problem takes the place of the old one; the file reads back as it was written."""
    a, b = (
        tuned.problem(CHIPS["v6e"], "glu", jnp.dtype("bfloat16"), pairs=2, depth=d, columns=64, rows=100, groups=3)
        for d in (8, 4)
    )
    tiles = tiling.Tiles(64, 64, 128, 128)
    old = [tuned.entry(a, tiles, ms=3.0), tuned.entry(b, tiles, ms=2.0)]
    merged = tuned.merge(old, [tuned.entry(a, tiles, ms=1.0)])
    assert [line["depth"] for line in merged] == [4, 8] and [line["ms"] for line in merged] == [2.0, 1.0]
    tuned.write(tmp_path / "t.json", merged)
    assert json.loads((tmp_path / "t.json").read_text()) == merged
    assert a.rows_per_group == 32
    tuned.write(tmp_path / "t.json", [])
    assert json.loads((tmp_path / "t.json").read_text()) == []


def test_neighbours_divide():
    """Whatever the rule chose, each candidate is whole tiles of the block and of the lanes, and none is the rule's own."""
    for rule in (tiling.Tiles(256, 128, 512, 256, 3), tiling.Tiles(512, 128, 768, 256, depth=1024)):
        around = tiling.neighbours(rule)
        assert rule not in around and len(around) >= 4
        for t in around:
            assert t.rows % t.block == t.columns % t.chunk == t.chunk % 128 == t.depth % 128 == 0


def test_climb():
    """Finds the bottom of a valley, counts what cannot be had, and does not follow noise."""
    seconds = {n: 1.0 + abs(n - 7) for n in range(20)}
    asked = []

    def measure(candidates):
        asked.append(candidates)
        return {n: seconds[n] for n in candidates if n != 4}

    found = tune.climb(9, lambda n: [n - 1, n + 1, 4], measure)
    assert (found.best, found.seconds, found.first) == (7, 1.0, 3.0)
    assert found.refused == 1 and found.tried == 1 + 3 + 1 + 1
    assert all(9 in candidates for candidates in asked), "the rule is measured in every round"
    level = tune.climb(9, lambda n: [n - 1, n + 1], lambda candidates: {n: 1 - n / 1000 for n in candidates})
    assert level.best == 9


@pytest.mark.parametrize(
    "chip, shape", [("v6e", Shape(48, 8, 160, 2)), ("h200", Shape(48, 64, 128, 2))], ids=["v6e", "h200"]
)
def test_a_case_interpreted(chip, shape, monkeypatch):
    """The whole path but the clock's meaning: draws, compiles candidates, compares them with the rule's result, makes an entry."""
    simulated = pltpu.InterpretParams() if chip == "v6e" else compat.gpu_interpreter()
    monkeypatch.setattr(tune.timing, "BURST", 0.0)
    kernels = pallas_tpu if chip == "v6e" else pallas_gpu
    all_of = kernels.neighbours
    monkeypatch.setattr(kernels, "neighbours", lambda tiles: all_of(tiles)[:2])
    monkeypatch.setattr(tune, "TURNS", 1)
    one = dataclasses.replace(CHIPS[chip], cores=1)
    found = tune.case(kernels, shape, "down", one, 1, simulated)
    assert found["chip"] == chip and found["kernel"] == "matmul" and found["tried"] >= 2 and found["ms"] > 0
    assert tune.line(found)
    assert tuned.key(found).depth == shape.hidden


def test_a_wrong_candidate_is_left_out(monkeypatch):
    """One that computes something else, and one that cannot be built, however fast."""
    wanted = (jnp.arange(4.0),)
    tables = {"right": lambda: wanted, "wrong": lambda: (2 * wanted[0],)}
    tried = {name: tune._tried(lambda t: tables[t], name, wanted) for name in ("right", "wrong", "missing")}
    assert tried["right"] is not None and tried["wrong"] is None and tried["missing"] is None
