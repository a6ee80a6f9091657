"""Programs read from their text: shapes and bytes, how often each instruction runs, loops with a bound and without."""

import jax
import jax.numpy as jnp
import pytest
from plan import compiled_text as text

from moejax.plan import hlo

W = text.array(32, 32)


def times(module, opcode="dot"):
    """How often each instruction of a kind runs, sorted."""
    return sorted(run.times for run in module.runs if run.instruction.opcode == opcode and run.times)


@pytest.mark.parametrize(
    "dtype, dims, size",
    [
        ("f32", (4, 8), 128),
        ("bf16", (3,), 6),
        ("pred", (5,), 5),
        ("f8e4m3fn", (2, 2), 4),
        ("s4", (3,), 2),
        ("s32", (), 4),
    ],
)
def test_bytes_of_an_array(dtype, dims, size):
    """By the number in the type's name; truth values take a byte, and halves of bytes are rounded up."""
    assert hlo.Shape(dtype, dims).bytes == size


def test_a_line():
    """A tuple of results with layouts, operands with their types, and the operation in the traced program."""
    line = (
        "  ROOT %while.3 = (s32[], f32[2,4]{1,0:T(8,128)}, /*index=2*/bf16[]) fusion(f32[2,4]{1,0} %a.1, s32[] %b), kind=kLoop, "
        'calls=%body.2, metadata={op_name="jit(f)/experts/dot_general"}'
    )
    found = hlo.parsed(line)
    assert found.name == "while.3" and found.root and found.opcode == "fusion" and found.operands == ("a.1", "b")
    assert found.shapes == (hlo.Shape("s32", ()), hlo.Shape("f32", (2, 4)), hlo.Shape("bf16", ()))
    assert found.scope == "jit(f)/experts/dot_general"
    assert hlo.parsed("  %c = s32[] constant(5)").operands == ("5",)
    assert hlo.parsed("  // a remark") is None
    with pytest.raises(ValueError, match="does not close"):
        hlo.parsed("  %a = f32[] add(%x, (%y)")


def test_a_scan_in_a_scan():
    """Three turns of one product, and in each five of another."""

    def inner(x, w):
        return jax.lax.scan(lambda c, _: (jnp.tanh(c @ w), None), x, None, length=5)[0]

    def outer(x, w):
        return jax.lax.scan(lambda c, _: (inner(c, w) + c @ w, None), x, None, length=3)[0]

    module = text.compiled(outer, text.array(16, 32), W)
    assert times(module) == [3, 15] and module.open_loops == []


def test_every_branch_counts():
    """One product in one branch and two in the other."""
    module = text.compiled(
        lambda p, x, w: jax.lax.cond(p, lambda: x @ w, lambda: jnp.tanh(x @ w) @ w),
        text.array(dtype=jnp.bool_),
        text.array(16, 32),
        W,
    )
    assert times(module) == [1, 1, 1]


def test_a_loop_that_ends_by_its_data_is_open():
    """It counts no turn and is listed by its place in the program, however deep; what is beside it counts."""

    def until_small(x, w):
        return jax.lax.while_loop(lambda c: jnp.sum(c) > 1, lambda c: c @ w, x) @ w

    def twice(x, w):
        return jax.lax.scan(lambda c, _: (until_small(c, w), None), x, None, length=2)[0]

    module = text.compiled(twice, text.array(16, 32), W)
    assert times(module) == [2]
    assert len(module.open_loops) == 1 and module.open_loops[0].endswith("while")


def loop(condition, attributes="", others="", start=("%start = (s32[], f32[4]) parameter(0)",)):
    """A program with a loop round one exponential, whose condition has these lines."""
    body = """%body (i: (s32[], f32[4])) -> (s32[], f32[4]) {
  %i = (s32[], f32[4]) parameter(0)
  %part = f32[4] get-tuple-element(%i), index=1
  %exponential = f32[4] exponential(%part)
  ROOT %next = (s32[], f32[4]) tuple(%i, %exponential)
}
"""
    test = "\n".join(f"  {line}" for line in ("%state = (s32[], f32[4]) parameter(0)", *condition))
    head = f"{others}\n{body}\n%condition (state: (s32[], f32[4])) -> pred[] {{\n{test}\n}}\n"
    end = f'ROOT %while = (s32[], f32[4]) while(%start), condition=%condition, body=%body, metadata={{op_name="rounds"}}{attributes}'
    return text.written(*start, end, others=head)


COUNTER = "%counter = s32[] get-tuple-element(%state), index=0"
SEVEN = "%seven = s32[] constant(7)"
OUTSIDE = """%compare_body (a: s32[], b: s32[]) -> pred[] {
  %a = s32[] parameter(0)
  %b = s32[] parameter(1)
  ROOT %less = pred[] compare(%a, %b), direction=LT
}
"""
INSIDE = """%compare_body (a: s32[]) -> pred[] {
  %a = s32[] parameter(0)
  %seven = s32[] constant(7)
  ROOT %more = pred[] compare(%seven, %a), direction=GT
}
"""


@pytest.mark.parametrize(
    "condition, others",
    [
        ((COUNTER, SEVEN, "ROOT %less = pred[] compare(%counter, %seven), direction=LT"), ""),
        ((COUNTER, SEVEN, "ROOT %more = pred[] compare(%seven, %counter), direction=GT"), ""),
        ((COUNTER, SEVEN, "ROOT %fused = pred[] fusion(%counter, %seven), kind=kLoop, calls=%compare_body"), OUTSIDE),
        ((COUNTER, "ROOT %fused = pred[] fusion(%counter), kind=kLoop, calls=%compare_body"), INSIDE),
    ],
    ids=["less", "more", "fused", "constant in the fusion"],
)
def test_a_bound_in_the_condition(condition, others):
    """The compiler did not say how often the loop turns; its condition compares with seven."""
    module = loop(condition, others=others)
    assert times(module, "exponential") == [7] and module.open_loops == []


@pytest.mark.parametrize(
    "condition, others",
    [
        (
            (
                COUNTER,
                "%limit = s32[] get-tuple-element(%state), index=0",
                "ROOT %less = pred[] compare(%counter, %limit), direction=LT",
            ),
            "",
        ),
        ((COUNTER, SEVEN, "ROOT %same = pred[] compare(%counter, %seven), direction=NE"), ""),
        ((COUNTER, SEVEN, "ROOT %down = pred[] compare(%counter, %seven), direction=GT"), ""),
        (("ROOT %flag = pred[] get-tuple-element(%state), index=0",), ""),
        (
            (
                COUNTER,
                "%limit = s32[] negate(%counter)",
                "ROOT %fused = pred[] fusion(%counter, %limit), kind=kLoop, calls=%compare_body",
            ),
            OUTSIDE,
        ),
    ],
    ids=["variable", "another comparison", "counts down", "no comparison", "fused variable"],
)
def test_no_bound_in_the_condition(condition, others):
    module = loop(condition, others=others)
    assert times(module, "exponential") == [] and module.runs and module.open_loops == ["rounds"]


def test_the_compilers_own_count_comes_first():
    condition = (COUNTER, SEVEN, "ROOT %less = pred[] compare(%counter, %seven), direction=LT")
    module = loop(condition, attributes=', backend_config={"known_trip_count":{"n":"4"}}')
    assert times(module, "exponential") == [4]


@pytest.mark.parametrize("begun", ["ROOT %less = pred[] compare(%counter, %seven), direction=LT", "fused"])
def test_a_loop_whose_first_turn_was_taken_out(begun):
    """It counts from one, which is copied into its state."""
    fused = "ROOT %fused = pred[] fusion(%counter, %seven), kind=kLoop, calls=%compare_body"
    condition = (COUNTER, SEVEN, fused if begun == "fused" else begun)
    state = (
        "%one = s32[] constant(1)",
        "%copied = s32[] copy(%one)",
        "%part = f32[4] parameter(0)",
        "%start = (s32[], f32[4]) tuple(%copied, %part)",
    )
    module = loop(condition, others=OUTSIDE if begun == "fused" else "", start=state)
    assert times(module, "exponential") == [6] and module.open_loops == []
