"""Sparse against dense at equal steps and equal time, by hand."""

import pytest

from moejax import config
from moejax.bench import experts
from moejax.errors import UserError
from moejax.train import check


def row(overrides, *values):
    return {"overrides": overrides, "each": {experts.NUMBER: list(values)} if values else {}}


@pytest.fixture
def result():
    found = experts.losses([
        row({"model.moe.num_experts": 4}, 1.8, 1.9), row({"model.moe.num_experts": 8}, 1.7, 1.7), row({"model.moe.num_experts": 16}),
        row({"model.pattern": ["attention+dense"], "train.steps": 100}, 2.0, 2.2),
        row({"model.pattern": ["attention+dense"], "train.steps": 400}, 1.6, 1.6),
    ])  # fmt: skip
    ratio = {name: {"median": of, "low": of, "high": of} for name, of in (("dense", 1.0), ("4", 2.0), ("8", 5.0))}
    return {"rounds": 3, "steps": 100, "ratio": ratio} | found


def test_equal_time_is_between_the_twins_runs(result):
    """Twice the time of 100 steps are 200, half the way to 400 in the logarithm; five times are more than was run."""
    found = experts.gains(result)
    assert found["4"]["equal steps"] == pytest.approx([0.2, 0.3])
    assert found["4"]["equal time"] == pytest.approx([0.0, 0.0])
    assert found["8"] == {"equal steps": pytest.approx([0.3, 0.5]), "equal time": []}
    assert "16" not in found
    assert "+0.2500 ± 0.0707" in experts.table(result)


def test_picture(result):
    assert experts.draw(result).startswith(b"\x89PNG")
    with pytest.raises(UserError, match=r"configs/sweeps/experts.py with --workdir=runs/experts"):
        experts.draw({"ratio": {}})


def test_settings_cost_the_same_and_can_be_run():
    """A token visits as many hidden units in each, and each passes every check."""
    found = experts.settings(config.Config())
    assert list(found) == ["dense", "1", "2", "4", "8", "16", "32", "64"]
    for name, cfg in found.items():
        check.check(cfg)
        moe = cfg.model.moe
        assert (cfg.model.hidden if name == "dense" else moe.top_k * moe.hidden) == 192
