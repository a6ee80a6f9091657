"""The comparison of upcycled models with continued dense training: numbers by hand, and its picture."""

from pathlib import Path

import numpy as np

from moejax.report import runs, upcycled

DATA = {"batch": 2, "context": 5}


def run(name, active, bits, heldout, every=10):
    """A finished run evaluated every few steps, a step of which costs 60 * active FLOPs."""
    step = every * np.arange(1, len(bits) + 1)
    curve = runs.Curve(step, np.array(bits))
    facts = {"parameters": {"total": 2 * active, "active": active}}
    config = {"train": {"steps": int(step[-1])}, "data": DATA}
    found = {"heldout/bits_per_byte": heldout}
    clock = runs.Curve(np.zeros(0, np.int64), np.zeros(0))
    return runs.Run(Path(), name, config, facts, {upcycled.CURVE: curve}, found, clock, 0.5, {}, "", [])


def test_numbers_and_picture():
    """Ahead is by compute and for good: a run of twice the cost is held to the dense one at twice the step."""
    base = run("base", 100, [3.0, 2.5], 2.4)
    dense = run("dense", 100, [2.4, 2.3, 2.2, 2.1], 2.0)
    twice = run("copies", 200, [2.25, 2.05], 1.9)
    late = run("granular", 100, [2.3, 2.4, 2.1, 2.0], 2.1)
    found = upcycled.numbers(base, {3: [dense, twice, late]})
    rows = found["seeds"][3]
    assert rows["dense"]["ahead_from_flops"] is None and rows["dense"]["flops"] == 40 * 6 * 100 * 10
    assert rows["copies"]["flops"] == 20 * 6 * 200 * 10 and rows["copies"]["ahead_from_flops"] == 10 * 6 * 200 * 10
    assert rows["granular"]["ahead_from_flops"] == 30 * 6 * 100 * 10
    np.testing.assert_allclose(rows["copies"]["gain_over_dense"], 0.1)
    np.testing.assert_allclose(rows["granular"]["gain_over_dense"], -0.1)
    assert "+0.1000" in upcycled.table(found)
    assert upcycled.draw(base, {3: [dense, twice, late]}).startswith(b"\x89PNG")
