"""What a plan says of a step, where the compiler's answer is made by hand: does it fit, what bounds it, in which order do meshes come."""

import numpy as np
import pytest
from plan.answers import PEAK, answer, row

from moejax import config, mesh
from moejax.errors import ConfigError
from moejax.plan import account, aot, pods, roofline, tables
from moejax.plan.hardware import parse_topology

EIGHT, FOUR = parse_topology("v5p:2x2x2"), parse_topology("v5p:2x2x1")
E = 64


def experiment(**sizes):
    """A sparse model whose numbers have many factors, on a mesh."""
    moe = config.MoE(num_experts=E, top_k=4, hidden=256, transport="ragged", receive_buffer=2.0)
    model = config.Model(
        vocab_size=512,
        loss_chunk=256,
        width=512,
        heads=8,
        kv_heads=8,
        head_dim=64,
        repeats=2,
        compute_dtype="bfloat16",
        moe=moe,
    )
    return config.Config(name="made", model=model, mesh=config.Mesh(**sizes), data=config.Data(context=256, batch=64))


@pytest.fixture
def compiler(monkeypatch):
    """compiler(answer) answers every request; a function answers each. Requests are in `asked`."""

    def replace(given):
        asked = []

        def compiled(request, cache, memory):
            asked.append(request)
            return dict(given(request) if callable(given) else given)

        monkeypatch.setattr(aot, "compiled", compiled)
        return asked

    return replace


def uneven(layers=2):
    """The first eighth of the experts gets two eighths of what is asked for: with them in one block, that device has twice the mean."""
    loads = np.full((layers, E), 600)
    loads[:, : E // 8] = 1400
    return loads


def test_a_step_that_fits(compiler):
    """Margin and seconds by hand: a tenth of a second of products, and half of the bytes of memory read, half written and read."""
    asked = compiler(answer(seconds=0.1, used=10e9, collectives=[row("all-gather", ["expert"], 8, 1e6)]))
    found = pods.facts(pods.Asked(experiment(expert=8), EIGHT))
    assert (asked[0].topology, asked[0].slices, asked[0].step) == ("v5p:2x2x2", 1, "train")
    assert (found["mesh"], found["mesh_from"], found["chips"]) == ({"expert": 8}, "given", 8)
    assert found["margin"] == pytest.approx(1 - 10e9 / EIGHT.chip.usable) and "reason" not in found
    seconds = found["roofline"]["seconds"]
    assert seconds["matrix"] == pytest.approx(0.1) and found["roofline"]["bound"] == "matrix"
    assert seconds["memory"] == pytest.approx((5e9 + 2 * 5e9) / EIGHT.chip.bandwidth)
    assert 0 < seconds["links"] < 0.01 and seconds["network"] == 0
    assert {c["transport"] for c in found["transports"]} >= {"ragged", "gather"}
    text = tables.of_plans([found])
    assert "expert=8" in text and "matrix units" in text and "0.1 s" in text and "mesh given" in text
    assert "all-gather" in text and "tokens/s at most" in text and "transports" in text and "measured load" not in text


def test_a_step_that_does_not_fit(compiler):
    """The reason has bytes and the largest kind; there is nothing to bound."""
    compiler(answer(used=204e9, fits=False))
    found = pods.facts(pods.Asked(experiment(expert=8), EIGHT))
    assert not found["fits"] and "roofline" not in found and found["margin"] < -0.9
    assert found["reason"].startswith(f"does not fit: 204.0 of {EIGHT.chip.usable / 1e9:.1f} GB, optimizer")
    text = tables.of_plans([found])
    assert text.count("does not fit") == 2 and "204.0 of" in text and "collective" not in text


def test_plans_that_fit_and_not_stand_in_one_table(compiler):
    compiler(lambda request: answer(fits=request.topology == "v5p:2x2x2"))
    both = [pods.facts(pods.Asked(experiment(expert=8), topology)) for topology in (EIGHT, parse_topology("v5p:2x4x1"))]
    head, first, second, *_ = tables.of_plans(both).splitlines()
    assert head.split()[0] == "topology" and first.split()[0] == "v5p:2x2x2" and second.split()[0] == "v5p:2x4x1"


def test_measured_loads_change_the_bound(compiler):
    """The slowest of eight devices has 1.75 of the mean: as many more FLOPs of experts, and as many more rows of a ragged exchange."""
    compiler(answer(seconds=0.1, collectives=[row("ragged-all-to-all", ["expert"], 8, 1e9)]))
    cfg = experiment(expert=8)
    even, found = (pods.facts(pods.Asked(cfg, EIGHT, loads=loads)) for loads in (None, uneven()))
    slowest = 8 * 1400 / (1400 + 7 * 600)
    assert even["load"]["slowest"] == 1 and found["load"]["slowest"] == pytest.approx(slowest)
    more = (slowest - 1) * roofline.expert_flops(account.of_config(cfg), cfg, "train") / 8 / PEAK
    before, after = even["roofline"]["seconds"], found["roofline"]["seconds"]
    assert after["matrix"] - before["matrix"] == pytest.approx(more) and more > 0
    assert after["links"] / before["links"] == pytest.approx(slowest)
    assert "measured load: the slowest device has 2.00 of the mean" in tables.of_plans([found])


def test_several_slices(compiler):
    """Twice the chips; a sum over all of them crosses the network."""
    asked = compiler(answer(devices=16, collectives=[row("all-reduce", ["data", "expert"], 16, 1e9)]))
    found = pods.facts(pods.Asked(experiment(data=2, expert=8), EIGHT, slices=2))
    assert asked[0].slices == 2 and found["chips"] == 16 and found["mesh"] == {"data": 2, "expert": 8}
    assert found["roofline"]["seconds"]["network"] > 0
    text = tables.of_plans([found])
    assert "v5p:2x2x2 x2" in text and "data-centre network" in text


def test_decoding_has_no_estimate_of_a_training_step(compiler):
    asked = compiler(answer(seconds=0.001))
    found = pods.facts(pods.Asked(experiment(expert=8), EIGHT, step="decode"))
    assert (
        asked[0].step == "decode"
        and "estimated_temporaries" not in found
        and "optimizer" not in found["arguments_by_kind"]
    )
    assert "temporaries were estimated" not in tables.of_plans([found])


def test_where_the_mesh_is_from():
    """Given, the config's own where it has the number of devices, or else the best by the estimate."""
    own, source = pods.with_mesh(pods.Asked(experiment(fsdp=2, expert=4), EIGHT), given=False)
    assert own.config.mesh == config.Mesh(fsdp=2, expert=4) and source == "given"
    chosen, source = pods.with_mesh(pods.Asked(experiment(), FOUR), given=False)
    assert np.prod(mesh.shape(chosen.config.mesh)) == 4 and "estimate" in source


@pytest.mark.parametrize(
    "sizes, slices, said",
    [
        (
            {"expert": 4},
            1,
            "mesh expert=4 has 4 devices, and 1 slice(s) of v5p:2x2x2 have 8; the product of --mesh must be 8",
        ),
        ({}, 1, "mesh of one device has 1 devices"),
        ({"data": 1, "expert": 8}, 2, "the product of --mesh must be 16"),
        ({"data": 1, "expert": 16}, 2, "a multiple of the slices"),
    ],
)
def test_a_given_mesh_of_another_size(sizes, slices, said):
    with pytest.raises(ConfigError) as error:
        pods.with_mesh(pods.Asked(experiment(**sizes), EIGHT, slices), given=True)
    assert said in str(error.value)


def test_a_given_mesh_that_the_torus_does_not_have():
    with pytest.raises(ConfigError, match="whole dimensions"):
        pods.with_mesh(pods.Asked(experiment(fsdp=8, expert=8), parse_topology("v5p:4x4x4")), given=True)


def test_the_order_of_a_search(compiler):
    """Of three that are compiled, the best by the estimate does not fit and the third is the fastest; then what only was estimated, and
    what does not fit last."""
    estimated = pods.search.search(experiment(), FOUR)
    first, second, third = (c.config.mesh for c in estimated[:3])
    speeds = {second: answer(seconds=2.0), third: answer(seconds=1.0), first: answer(used=500e9, fits=False)}
    asked, said = compiler(lambda request: speeds[request.config.mesh]), []
    order = pods.searched(pods.Asked(experiment(), FOUR), 3, said.append)
    assert [r.config.mesh for r in asked] == [first, second, third] and all(
        line.startswith("compiling ") for line in said
    )
    assert [c.config.mesh for c in order[:2]] == [third, second] and [c.compiled for c in order[:3]] == [
        True,
        True,
        False,
    ]
    assert order[-1].config.mesh == first and "does not fit: 500.0 of 102.0 GB" in order[-1].reason
    assert len(order) == len(estimated) and [c.fits for c in order] == sorted((c.fits for c in order), reverse=True)
    head, *lines = tables.of_search(order).splitlines()
    assert (
        head.split()[:2] == ["mesh", "micro"]
        and " compiler" in lines[0]
        and " compiler" in lines[1]
        and " estimate" in lines[2]
    )
    assert (
        len(lines) == tables.SHOWN + 2
        and lines[-2] == f"and {len(order) - tables.SHOWN} more"
        and "none hidden" in lines[-1]
    )


def test_loads_are_felt_on_the_mesh_of_each_candidate(compiler):
    """The config has no mesh of its own. A mesh that cuts experts is slower under the load, by the compiler's seconds too."""
    compiler(answer(seconds=0.1))
    even, felt = (
        pods.searched(pods.Asked(experiment(), FOUR, loads=loads), 99, lambda line: None) for loads in (None, uneven())
    )
    before = {c.config.mesh: c.roofline.seconds.matrix for c in even}
    more = {c.config.mesh: c.roofline.seconds.matrix - before[c.config.mesh] for c in felt}
    assert all(c.compiled for c in felt) and {m.expert > 1 for m in more} == {True, False}
    for on, seconds in more.items():
        assert (seconds > 0) == (on.expert > 1), on


def test_a_refused_mesh_stays_with_its_reason(compiler):
    def refuse(request):
        raise ConfigError("the compiler said no")

    compiler(refuse)
    order = pods.searched(pods.Asked(experiment(), FOUR), 1, lambda line: None)
    assert order[0].fits and not order[0].compiled
    (refused,) = [c for c in order if c.compiled]
    assert not refused.fits and refused.reason == "refused: the compiler said no"


def test_programs_are_compiled_for_tpu_alone():
    assert [t.name for t in pods.topologies(["v5p:2x2x2", "v5e:4x4"])] == ["v5p:2x2x2", "v5e:4x4"]
    with pytest.raises(ConfigError, match="choose a chip from v4, v5e, v5p, v6e, tpu7x$"):
        pods.topologies(["v5p:2x2x2", "h200:8"])
