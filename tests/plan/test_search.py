"""Meshes found on slices: each is allowed and lies on the torus, what does not fit comes last, a compiler may change the order."""

import dataclasses
import math

import pytest

from moejax import config, mesh
from moejax.errors import ConfigError
from moejax.plan import links, search
from moejax.plan.hardware import parse_topology
from moejax.plan.skew import EVEN
from moejax.train import check


def experiment(**changes):
    """A sparse model whose numbers have many factors."""
    moe = config.MoE(num_experts=64, top_k=4, hidden=256, transport="ragged")
    model = config.Model(
        vocab_size=512, loss_chunk=256, width=512, heads=8, kv_heads=8, head_dim=64, compute_dtype="bfloat16", moe=moe
    )
    cfg = config.Config(model=model, data=config.Data(context=256, batch=512))
    return dataclasses.replace(cfg, **changes)


def model(cfg, **changes):
    return dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, **changes))


@pytest.fixture(scope="module")
def found():
    return search.search(experiment(), parse_topology("v5p:4x4x4"))


def test_every_way_to_write_a_number():
    assert sorted(search.sizes(6, 2)) == [(1, 6), (2, 3), (3, 2), (6, 1)]
    assert len(list(search.sizes(512, 5))) == math.comb(9 + 4, 4)


def test_every_candidate_is_allowed(found):
    """By the config's check and by the torus, and has all devices."""
    assert len(found) > 10
    for candidate in found:
        check.check(candidate.config)
        sizes = dict(zip(mesh.AXES, mesh.shape(candidate.config.mesh), strict=True))
        assert math.prod(sizes.values()) == 64
        assert links.lay(candidate.topology, sizes) is not None


def test_a_mesh_that_does_not_divide_is_none_of_them():
    """12 experts lie on 4 devices, not on 16; of a 4x4x4 torus no axis has 2 or 8 devices."""
    cfg = experiment()
    moe = dataclasses.replace(cfg.model.moe, num_experts=12)
    found = search.search(model(cfg, moe=moe), parse_topology("v5p:4x4x4"))
    assert {c.config.mesh.expert for c in found} == {1, 4}
    assert {n for c in found for n in mesh.shape(c.config.mesh)} <= {1, 4, 16, 64}


def test_the_best_come_first(found):
    times = [c.roofline.seconds.serial for c in found if c.fits]
    assert times == sorted(times) and found[0].fits
    assert search.search(experiment(), parse_topology("v5p:4x4x4"), keep=3) == found[:3]


def test_slices_lie_along_one_axis():
    """Every candidate has a multiple of them there, and sends over the network between."""
    found = search.search(experiment(), parse_topology("v5p:2x2x2"), slices=2)
    assert all(c.config.mesh.data % 2 == 0 and c.roofline.seconds.network > 0 for c in found)


def test_what_does_not_fit_says_so():
    """A hundred billion parameters on eight chips of 16 GB."""
    moe = dataclasses.replace(experiment().model.moe, hidden=65536)
    short = experiment(data=config.Data(context=16, batch=512))
    found = search.search(model(short, repeats=16, moe=moe), parse_topology("v5e:2x4"))
    assert not any(c.fits for c in found)
    assert "does not fit" in found[0].reason and "of 16.9 GB, gradients" in found[0].reason
    assert [c.used for c in found] == sorted(c.used for c in found)


def test_a_reason_names_the_bound(found):
    best = found[0]
    name = search.NAMES[best.roofline.seconds.bound]
    assert best.reason.startswith(f"{name}: ") and best.reason.endswith("s")


def test_time_rises_with_skew(found):
    """Of a mesh that cuts experts; one that does not is not slower."""
    uneven = search.search(experiment(), parse_topology("v5p:4x4x4"), load=lambda cfg: EVEN._replace(slowest=2.0))
    by_mesh = {c.config.mesh: c.roofline.seconds.serial for c in uneven}
    cut = [c for c in found if c.config.mesh.expert > 1]
    assert cut and all(by_mesh[c.config.mesh] > c.roofline.seconds.serial for c in cut)


def test_a_config_without_a_mesh_says_why():
    cfg = experiment()
    with pytest.raises(ConfigError, match="loss_chunk"):
        search.search(model(cfg, loss_chunk=100), parse_topology("v5p:2x2x2"))


def answer(fits=True, seconds=1.0, used=1):
    """Of a compiler: a step that computes so long."""
    memory = {"arguments": used, "outputs": 0, "temporaries": 0, "code": 0, "donated": 0, "used": used, "room": 100}
    flops = {"total": seconds * 459e12}
    return {"fits": fits, "devices": 64, "tokens": 1, "flops": flops, "memory": memory, "collectives": []}


def test_a_compiler_has_the_last_word(found):
    """One does not fit, one is slow, one refused, the last fast: it wins, and none that fits follows one that does not."""
    four = found[:4]

    def compiles(candidate):
        place = four.index(candidate)
        if place == 2:
            raise ConfigError("no such mesh")
        return answer(fits=place != 0, seconds=(0, 2.0, 0, 1.0)[place], used=200 if place == 0 else 1)

    again = search.refine(four, compiles)
    assert [c.config for c in again[:2]] == [four[3].config, four[1].config]
    assert all(c.compiled for c in again) and [c.fits for c in again] == [True, True, False, False]
    assert again[0].roofline.seconds.matrix == pytest.approx(1.0)
    assert {c.reason.partition(":")[0] for c in again[2:]} == {"does not fit", "refused"}
