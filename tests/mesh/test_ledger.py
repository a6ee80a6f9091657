"""docs/shapes.md against the library: where parameters lie, and sizes that its formulas give."""

import pathlib
import re

import jax
import pytest
from train import small

from moejax import config, mesh
from moejax.moe.transport import TRANSPORTS
from moejax.train import state

PAGE = (pathlib.Path(__file__).parents[2] / "docs" / "shapes.md").read_text()
EVERYTHING = {
    "model.first": ("latent+dense",), "model.latent.query_rank": 8, "model.attention.norm": "whole", "model.attention.sinks": True,
    "model.attention.bias": True, "model.attention.out_bias": True, "model.further": 1, "model.moe.router_bias": True,
    "model.pattern": ("attention+dense", "attention+sparse"), "model.moe.shared_hidden": 8, "model.moe.shared_gate": True,
    "model.moe.latent": 8, "model.moe.expert_bias": True, "model.moe.zero_experts": ("constant",), "model.moe.router": "noisy_topk",
}  # fmt: skip


def stated():
    """path -> (dimensions, mesh axes of each) of every parameter that the page names."""
    table = PAGE.split("<!-- parameters -->")[1].split("<!-- end -->")[0]
    found = {}
    for names, dims in re.findall(r"^\| (`.*`) \| \[(.*)\] \|$", table, re.MULTILINE):
        axes = [tuple(dim.split(":")[1].split("+")) if ":" in dim else () for dim in dims.split(", ")]
        found |= {name: axes for name in re.findall(r"`([^`]+)`", names)}
    return found


def short(path):
    """`channel.router.logits` of the path of a parameter, without the layer it is of, and whether it is stacked over blocks."""
    parts = [str(getattr(p, "key", getattr(p, "idx", p))) for p in path]
    before = {"blocks": 3, "first": 2, "further": 3 if parts[2:3] == ["layer"] else 2}
    return ".".join(parts[before.get(parts[0], 0) :]), parts[0] == "blocks"


@pytest.fixture(scope="module")
def built():
    cfg = small.configure(**EVERYTHING, **{"mesh.fsdp": 2, "mesh.expert": 2, "mesh.tensor": 2, "model.kv_heads": 2})
    on = mesh.make(cfg.mesh, jax.devices()[:8])
    with jax.set_mesh(on):
        return state.build(cfg, on)


def test_parameters_lie_as_the_page_says(built):
    """Each parameter of a model of every part, its dimensions and their axes; the page names no other."""
    page, seen = stated(), set()
    for path, sharding in jax.tree_util.tree_leaves_with_path(built.shardings):
        name, stacked = short(path)
        spec = [() if a is None else (a,) if isinstance(a, str) else tuple(a) for a in sharding.spec]
        assert spec[stacked:] == page[name], name
        assert not stacked or spec[0] == ()
        seen.add(name)
    assert seen == page.keys()


def test_every_transport_has_a_ledger():
    heads = " ".join(re.findall(r"^### (.*)$", PAGE, re.MULTILINE))
    assert all(re.search(rf"\b{name}\b", heads) for name in TRANSPORTS) and config.MoE().transport in heads
