"""Sweep files of both dialects, and what they become: overrides, ids, names, options of a command line."""

import ast
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from absl import flags

from moejax import cli, config
from moejax.errors import ConfigError
from moejax.sweep import grid, members, plan

ROOT = Path(__file__).parents[2]
SWEEPS = sorted((ROOT / "configs" / "sweeps").glob("*.py"))


def module(**functions):
    found = types.ModuleType("made")
    found.__file__ = "made.py"
    vars(found).update(functions)
    return found


def hyper(function):
    return grid.expand(module(get_hyper=function))


def test_product_zip_and_chain():
    """By hand: the last varies fastest, a zip goes one by one, a chain is one after the other."""
    h = grid.Hyper
    a, b = h.sweep("config.a", [1, 2]), h.sweep("b", "xy")
    assert hyper(lambda h: h.product([a, b])) == [
        {"a": 1, "b": "x"}, {"a": 1, "b": "y"}, {"a": 2, "b": "x"}, {"a": 2, "b": "y"},
    ]  # fmt: skip
    assert hyper(lambda h: h.zipit([a, b, h.fixed("c", 0, length=2)])) == [
        {"a": 1, "b": "x", "c": 0}, {"a": 2, "b": "y", "c": 0},
    ]  # fmt: skip
    assert hyper(lambda h: h.chainit([a, h.fixed("c", 0)])) == [{"a": 1}, {"a": 2}, {"c": 0}]
    assert hyper(lambda h: h.product([])) == [{}]
    assert hyper(lambda h: h.product([h.sweep("a", h.discrete([1])), h.chainit([b, h.fixed("c", 2)])])) == [
        {"a": 1, "b": "x"}, {"a": 1, "b": "y"}, {"a": 1, "c": 2},
    ]  # fmt: skip


def test_the_other_dialect_says_the_same():
    def sweep(add):
        for a in (1, 2):
            add({"config.a": a}, b=3)

    assert grid.expand(module(sweep=sweep)) == [{"a": 1, "b": 3}, {"a": 2, "b": 3}]


@pytest.mark.parametrize(
    ("functions", "message"),
    [
        ({}, "defines no sweep"),
        ({"sweep": lambda add: None, "get_hyper": lambda h: []}, "defines sweep and get_hyper"),
        ({"sweep": lambda add: None}, "gives no run"),
        ({"get_hyper": lambda h: h.zipit([h.sweep("a", [1]), h.sweep("b", [1, 2])])}, r"\[1, 2\] runs"),
        ({"get_hyper": lambda h: h.product([h.sweep("a", [1]), h.sweep("config.a", [2])])}, "config.a is set twice"),
        ({"sweep": lambda add: add({"a": 1}, **{"config.a": 1})}, "config.a is set twice"),
    ],
)
def test_what_is_no_sweep(functions, message):
    with pytest.raises(ConfigError, match=message):
        grid.expand(module(**functions))


def made(*overrides):
    return members.members(config.default(), list(overrides))


def test_ids_are_those_of_the_overrides():
    """In any order, and whatever else changes in the library; this one is written down so that no version finds runs of another lost."""
    first, second = (
        made({"train.seed": 1, "model.moe.top_k": 2}),
        made({"model.moe.top_k": 2, "train.seed": np.int64(1)}),
    )
    assert first[0].id == second[0].id == "60df7365"
    assert first[0].name == "seed=1_top_k=2"
    assert made({"train.seed": 1})[0].id != first[0].id


def test_runs_do_not_know_of_each_other():
    """What one sets is not in the next."""
    first, second = made({"train.steps": 7, "train.warmup": 1}, {"train.seed": 3})
    assert (first.config.train.steps, first.config.train.seed) == (7, 0)
    assert (second.config.train.steps, second.config.train.seed) == (config.Train().steps, 3)


def test_names_are_short_and_fit_a_folder():
    (one,) = made({"model.pattern": ["attention+dense"], "train.seed": 1, "data.seed": 1})
    assert one.folder == f"pattern=attention+dense_seed=1-{one.id}"
    assert one.config.name == one.name
    assert made({"name": "two words", "train.seed": 2})[0].folder.startswith("two-words-")
    assert made({})[0].name == "default"
    long = {
        f"model.moe.{name}": 1.25
        for name in ("gate_scale", "router_z", "receive_buffer", "activation_clamp", "importance")
    }
    assert len(made(long | {"train.learning_rate": 1e-3, "train.weight_decay": 0.125})[0].name) <= members.LONGEST


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            {"model.moe.topk": 1},
            "run topk=1 of the sweep: config.model.moe.topk is not an option; did you mean config.model.moe.top_k",
        ),
        ({"moel.moe.top_k": 1}, "there is no section moel"),
        ({"model.moe.top_k": "2"}, "is str; it must be int"),
        ({"model.moe.num_experts": 4, "model.moe.top_k": 5}, "run num_experts=4_top_k=5 of the sweep"),
    ],
)
def test_every_run_is_checked_before_the_first_begins(overrides, message):
    with pytest.raises(ConfigError, match=message):
        made({"train.seed": 1}, overrides)


def test_runs_that_are_alike_are_refused():
    with pytest.raises(ConfigError, match="seed=1 is in the sweep 2 times"):
        made({"train.seed": 1}, {"train.seed": 1})


VALUES = {
    "model.pattern": ("attention+sparse", "attention+dense"), "model.repeats": 2, "model.moe.capacity_factor": 1.25,
    "model.moe.router": "topk", "model.moe.renormalize": False, "model.moe.zero_experts": (), "train.learning_rate": 1e-3,
    "data.skip": (1, 3), "model.moe.hidden_classes": (), "model.moe.eval_capacity_factor": None, "model.moe.top_k_start": None,
    "data.files": "a b's/*.md",
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # of ml_collections
def test_the_command_line_makes_the_same_config(monkeypatch):
    """Every kind of value survives the way over the options of scripts/train.py."""
    (one,) = made(VALUES)
    own = flags.FlagValues()
    holder = cli.config_flags.DEFINE_config_file("config", None, "", flag_values=own)
    monkeypatch.setattr(sys, "argv", ["train.py", f"--config={ROOT}/tests/sweep/default.py", *one.options])
    own(sys.argv)
    assert config.resolve(holder.value) == one.config


@pytest.mark.parametrize("file", SWEEPS, ids=lambda p: p.stem)
def test_ready_sweeps(file):
    """Every one expands, passes every check, has ids of its own, and says in its head how it is run."""
    tree = grid.load(str(file)).get_config()
    found = plan.read(str(file), tree, [], "runs")
    assert len(found.members) > 3
    docstring = ast.get_docstring(ast.parse(file.read_text()))
    assert f"--config=configs/sweeps/{file.name}" in docstring
