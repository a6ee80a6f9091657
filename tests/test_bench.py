"""Benches that compare: what they time is first held to be the same function."""

import importlib.util
import json
import pathlib
import sys
import textwrap

import numpy as np
import pytest

from moejax import config
from moejax.bench import block, peer
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
    assert "ragged_dot" in block.table(result) and json.dumps(result)


def test_another_function_is_not_timed():
    wanted = np.ones((2, 3, 4), np.float32)
    block._same("peer", wanted, wanted, SMALL)
    with pytest.raises(UserError, match=r"computes something else: 16.7 % of tokens"):
        block._same("peer", np.where(np.arange(6).reshape(2, 3, 1) == 4, 0, wanted), wanted, SMALL)


@pytest.fixture
def parrot(monkeypatch, tmp_path):
    """A peer that knows one block: y is x, and a call takes 0.25 s of its own clock."""
    script = tmp_path / "parrot.py"
    script.write_text(
        textwrap.dedent("""
            import json, sys
            import numpy as np
            x = np.load(sys.argv[1])["x"]
            print(json.dumps({"versions": {"parrot": sys.argv[2]}, "names": ["parrot"]}), flush=True)
            for line in sys.stdin:
                asked = json.loads(line)
                if asked["kind"] == "output":
                    np.save(sys.argv[1] + ".npy", x)
                    print(json.dumps({"file": sys.argv[1] + ".npy"}), flush=True)
                else:
                    print(json.dumps({"seconds": 0.25}), flush=True)
        """)
    )
    monkeypatch.setattr(peer, "SCRIPT", script)


def test_a_peer_in_a_process_of_its_own(parrot):
    """It gets arrays, gives its output, and is asked for one call at a time."""
    x = np.arange(6, dtype=np.float32)
    other = peer.Peer(sys.executable, {"x": x}, "float32")
    assert other.names == ["parrot"] and other.versions == {"parrot": "float32"}
    np.testing.assert_array_equal(other.output("parrot"), x)
    assert {name: clock() for name, clock in other.clocks().items()} == {"parrot forward": 0.25, "parrot both": 0.25}
    other.close()


def test_a_peer_that_dies_says_what_it_needs(monkeypatch, tmp_path):
    broken = tmp_path / "broken.py"
    broken.write_text("raise SystemExit(3)")
    monkeypatch.setattr(peer, "SCRIPT", broken)
    with pytest.raises(UserError, match="ended with code 3; it needs torch"):
        peer.Peer(sys.executable, {"x": np.zeros(1)}, "float32")


def test_the_block_without_a_config_is_the_experiment_file():
    spec = importlib.util.spec_from_file_location("block_config", ROOT / "configs" / "block.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert config.resolve(module.get_config()) == block.DEFAULT
