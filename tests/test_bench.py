"""Benches that compare: what they time is first held to be the same function."""

import importlib.util
import json
import pathlib
import sys

import numpy as np
import pytest

from moejax import config
from moejax.bench import block, convert, peer
from moejax.errors import UserError

ROOT = pathlib.Path(__file__).parents[1]
SMALL = config.Config(
    data=config.Data(batch=2, context=16), model=config.Model(width=8, moe=config.MoE(num_experts=4, top_k=2, hidden=8))
)


@pytest.mark.slow
def test_the_block_against_ragged_dot(monkeypatch):
    """Times and ratios; a table a person can read."""
    monkeypatch.setattr(block, "SKEWS", {"zipf": block.SKEWS["zipf"]})
    result = block.run(SMALL, 2, ("dense", "ragged_dot"))
    assert [row["skew"] for row in result["rows"]] == ["zipf"] and result["rows"][0]["max_load_over_mean"] > 1
    for row in result["rows"]:
        for kind in ("forward", "both"):
            assert row[kind]["ms"].keys() == {"moejax", "dense", "ragged_dot"}
            assert row[kind]["over_moejax"].keys() == {"dense", "ragged_dot"}
    assert result["peers"]["ragged_dot"]["ragged_dot"].startswith("jax")
    assert "ragged_dot" in block.table(result) and json.dumps(result)


def test_another_function_is_not_timed():
    wanted = np.ones((2, 3, 4), np.float32)
    block._same("peer", wanted, wanted, SMALL)
    with pytest.raises(UserError, match=r"computes something else: 16.7 % of tokens"):
        block._same("peer", np.where(np.arange(6).reshape(2, 3, 1) == 4, 0, wanted), wanted, SMALL)


PARROT = """
import time

def blocks(arrays, settings):
    def sleep():
        time.sleep(settings["seconds"])
    return {"parrot": {"forward": lambda: arrays["x"], "both": sleep}}, lambda y: 2 * y, {"parrot": 1}
"""


def test_a_peer_in_a_process_of_its_own(tmp_path):
    """It gets arrays and settings, gives its output, and is asked for one call at a time, by its own clock."""
    file = tmp_path / "parrot.py"
    file.write_text(PARROT)
    x = np.arange(6, dtype=np.float32)
    with peer.Peer(sys.executable, str(file), "", {"x": x}, {"seconds": 0.05}) as other:
        assert other.names == ["parrot"] and other.versions == {"parrot": 1}
        np.testing.assert_array_equal(other.output("parrot"), 2 * x)
        clocks = other.clocks()
        assert list(clocks) == ["parrot forward", "parrot both"]
        assert clocks["parrot both"]() >= 0.05 and clocks["parrot forward"]() > 0
    assert other._process.returncode == 0


def test_a_peer_that_dies_says_what_it_needs(tmp_path):
    broken = tmp_path / "broken.py"
    broken.write_text("raise SystemExit(3)")
    with pytest.raises(UserError, match="ended with code 3; give another"):
        peer.Peer(sys.executable, str(broken), "give another", {"x": np.zeros(1)}, {})
    with pytest.raises(UserError, match="no_python cannot be run: .*; give another"):
        peer.Peer("no_python", "peer_hf.py", "give another", {"x": np.zeros(1)}, {})


def test_the_block_without_a_config_is_the_experiment_file():
    spec = importlib.util.spec_from_file_location("block_config", ROOT / "configs" / "block.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert config.resolve(module.get_config()) == block.DEFAULT


@pytest.mark.slow
def test_converting_is_measured_in_processes_of_its_own(monkeypatch):
    """Every byte is read and made, memory is told apart, and of a small checkpoint none of it is much."""
    monkeypatch.setattr(
        convert, "SETTINGS", tuple(convert.Setting(kind, "bfloat16", "float32", 4e-3) for kind in ("stream", "begin"))
    )
    monkeypatch.setattr(convert, "SHARD", 10**6)
    monkeypatch.setattr(convert, "POOL", 2**16)
    monkeypatch.setattr(convert, "ROOM", 2e9)
    small = config.Model(width=64, attention=config.Attention(norm="head"), moe=config.MoE(num_experts=8, hidden=64))
    result = convert.run(config.Config(model=small), 1)
    stream, begin = result["settings"]
    assert stream["shards"] > 3 and stream["files_gb"] >= 4e-3 and stream["layers"] > 1
    assert stream["arrays_gb"] == pytest.approx(2 * stream["files_gb"], abs=2e-3)
    assert begin["arrays_gb"] == pytest.approx(3 * stream["arrays_gb"], abs=2e-3)
    for row in (stream, begin):
        assert 0 < row["of_that_before_gb"] <= row["peak_gb"] < 2 and row["peak_of_mapped_files_gb"] > 0
    assert "begin" in convert.table(result) and json.dumps(result)


def test_a_checkpoint_too_large_for_the_machine_is_refused(tmp_path):
    with pytest.raises(UserError, match="set TMPDIR"):
        convert.require_room(tmp_path, 1e18, 0)
    with pytest.raises(UserError, match="GB of memory are available"):
        convert.require_room(tmp_path, 0, 1e18)
