"""Plans against what the compiler says: FLOPs, arguments (B34), collectives, temporaries; and six programs, kept in the repository."""

import difflib

import jax
import pytest
from aot import planned, programs

from moejax.plan import temporaries, traffic

pytestmark = programs.MARKS


@pytest.fixture(scope="module")
def found():
    return planned.compiled(tuple(planned.CASES))


@pytest.mark.parametrize("name", planned.CASES)
def test_b34_executed_flops_are_those_of_the_program(found, name):
    """Every matrix product of the traced step is in the compiled one, loops multiplied in, kernels by their estimates: to 0.5 %."""
    own = found[name]
    assert not own["kernels_without_estimate"]
    assert own["executed_flops"] == pytest.approx(own["flops"]["total"], rel=0.005)


@pytest.mark.parametrize("name", planned.CASES)
def test_b34_argument_bytes_are_those_of_the_program(found, name):
    """What the plan counts from shapes, shardings and tiles is what the program takes, to 1 %."""
    assert planned.argument_bytes(name) == pytest.approx(found[name]["memory"]["arguments"], rel=0.01)


@pytest.mark.parametrize("name", planned.TRAINING)
def test_collectives_are_those_of_the_plan(found, name):
    """What a training step sends, counted from shapes: bytes on the wire by kind and axes, to 2 % or half a megabyte, which scales, routers
    and integers take."""
    counted = planned.wire(traffic.rows(planned.CASES[name].config))
    compiled = planned.wire(found[name]["collectives"])
    for key in counted.keys() | compiled.keys():
        assert counted.get(key, 0) == pytest.approx(compiled.get(key, 0), rel=0.02, abs=5e5), key


@pytest.mark.parametrize("name", planned.TRAINING)
def test_temporaries_are_near_the_estimate(found, name):
    made, estimate = found[name]["memory"]["temporaries"], temporaries.estimate(planned.CASES[name].config).total
    assert made == pytest.approx(estimate, rel=temporaries.MARGIN)


@pytest.mark.parametrize("name", planned.GOLDEN)
def test_what_a_program_sends_is_what_is_kept(found, name):
    """Collectives by kind and axis, kernels and FLOPs. A change that is meant is written with `python tests/aot/planned.py NAME`."""
    if not jax.__version__.startswith("0.10."):
        pytest.skip("the goldens are of the compiler of jax 0.10")
    kept = (planned.FOLDER / f"{name}.txt").read_text().splitlines()
    now = planned.text(name, found[name]).splitlines()
    diff = "\n".join(difflib.unified_diff(kept, now, "kept", "now", lineterm="", n=0))
    assert not diff, f"the program of {name} has changed:\n{diff}"


def test_goldens_are_of_cases_that_exist():
    assert {f.stem for f in planned.FOLDER.glob("*.txt")} == set(planned.GOLDEN)
