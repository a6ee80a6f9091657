"""The coordinate check: with the rules of transfer nothing grows with the model, without them some things do."""

import dataclasses
import functools
import json
import pathlib

import jax
import numpy as np
import pytest
from train import small

from moejax import config, mesh
from moejax.bench import coordinates

ROOT = pathlib.Path(__file__).parents[2]
ROWS, CONTEXT = 16, 32
CFG = dataclasses.replace(
    coordinates.DEFAULT,
    model=config.Model(
        width=32, repeats=1, heads=2, kv_heads=1, head_dim=16, hidden=48,
        moe=config.MoE(num_experts=8, hidden=48, gate_scale=2.0),
    ),
    data=config.Data(context=CONTEXT, batch=ROWS),
)  # fmt: skip
ENDS = {name: (times[0], times[-1]) for name, (_, times) in coordinates.LADDERS.items()}


def text(number):
    """Batches of this library's own text, and one that no step reads."""
    sources = "".join(path.read_text() for path in sorted((ROOT / "moejax").rglob("*.py"))[:40]).encode()
    windows = (
        np.frombuffer(sources, np.uint8)[: number * ROWS * (CONTEXT + 1)].reshape(number, ROWS, -1).astype(np.int32)
    )
    on, ones = mesh.make(config.Mesh(), jax.devices()[:1]), np.ones((ROWS, CONTEXT), np.int32)
    for window in windows:
        host = {"tokens": window[:, :-1], "targets": window[:, 1:], "segments": ones, "labels": 0 * ones}
        yield small.place(host | {"valid": ones > 0, "row_ids": np.arange(ROWS, dtype=np.int32)}, on)


@pytest.fixture(scope="module")
def ladders():
    """The ends of every ladder, one seed. More experts have no factor, so without rules they are the same run."""
    *training, probe = text(coordinates.STEPS + 1)
    measure = functools.cache(lambda cfg: coordinates.measured(cfg, training, probe, (0,)))
    pairs = [
        (name, rules)
        for name in coordinates.LADDERS
        for rules in coordinates.RULES
        if (name, rules) != ("experts", "none")
    ]
    with small.quick():
        return {(name, rules): coordinates.climbed(CFG, name, rules, ENDS[name], measure) for name, rules in pairs}


def apart(found, kind):
    return {name: coordinates.ratio(values[kind]) for name, values in found.items() if "learned" not in name}


@pytest.mark.slow
@pytest.mark.parametrize("name", coordinates.LADDERS)
def test_with_the_rules_sizes_stay(ladders, name):
    """Width 4 times, experts 8 times, expert width 4 times: after ten steps nothing is half as large again."""
    for kind in ("size", "change"):
        found = apart(ladders[name, "mup"], kind)
        assert max(found.values()) < coordinates.LIMIT, found


@pytest.mark.slow
@pytest.mark.parametrize("name", ["width", "expert width"])
def test_without_them_some_do_not(ladders, name):
    """What the sparse layer adds is about twice as much; at twice this size 3 to 17 times (docs/transfer.md)."""
    found = apart(ladders[name, "none"], "change")
    assert found["channel 0"] > 1.9, found


def test_what_was_measured():
    """benchmarks/coordinates_cpu.json, on which docs/transfer.md and its picture stand, holds what the page says."""
    result = json.loads((ROOT / "benchmarks/coordinates_cpu.json").read_text())
    for name, found in result["ladders"].items():
        for kind in ("size", "change"):
            assert max(apart(found["mup"], kind).values()) < coordinates.LIMIT, name
    page = (ROOT / "docs/transfer.md").read_text()
    assert coordinates.table(result) in page
    assert coordinates.draw(result).startswith(b"\x89PNG")
