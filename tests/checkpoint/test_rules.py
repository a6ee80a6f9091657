"""Rules: what they write is what NumPy says, the way back is the way there, and nothing is missing, twice, unread or of another shape."""

import pathlib
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.checkpoint import paths
from moejax.checkpoint.entries import Mean, Noise, Scale, Select, Tile
from moejax.checkpoint.planning import apply, plan
from moejax.checkpoint.rules import Rule, RuleError, drop, fresh, inverse
from moejax.checkpoint.transforms import Goal, Join, Resize, Split, Stack, Transpose, Unstack

X = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
ORDER = ((2, 0, 1), (1, 2, 0))

TRANSFORMS = {
    "tile": (Tile(1, 2), X[:, [0, 1, 2, 0, 1, 2]]),
    "split": (Split(2, 2, 1), np.stack([X[:, :, :2], X[:, :, 2:]], axis=1)),
    "split in place": (Split(2, 2, 2), X.reshape(2, 3, 2, 2)),
    "join": (Join(1, 3, 1), X.reshape(2, 12)),
    "longer": (Resize(1, 3, 5, 7.0), np.concatenate([X, np.full((2, 2, 4), 7, np.float32)], axis=1)),
    "shorter": (Resize(2, 4, 3), X[:, :, :3]),
    "one order": (Select(ORDER[:1], 1), X[:, [2, 0, 1]]),
    "an order for each layer": (Select(ORDER, 1), np.stack([X[0][[2, 0, 1]], X[1][[1, 2, 0]]])),
    "an order of the first axis": (Select(((1, 0),), 0), X[::-1]),
    "copies": (Select(((0, 0, 2, 2),), 1), X[:, [0, 0, 2, 2]]),
    "means": (Mean((((0, 2), (1,)),), 1), np.stack([(X[:, 0] + X[:, 2]) / 2, X[:, 1]], axis=1)),
    "means for each layer": (
        Mean((((0, 2), (1,)), ((0, 1), (2,))), 1),
        np.stack([[(X[0, 0] + X[0, 2]) / 2, X[0, 1]], [(X[1, 0] + X[1, 1]) / 2, X[1, 2]]]),
    ),
    "transpose": (Transpose((2, 0, 1)), np.einsum("abc->cab", X)),
    "scale": (Scale(0.5), X / 2),
}  # fmt: skip


def run(transform, x):
    (value,) = transform.parts({(): x}, Goal("leaf", {})).values()
    return value


@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_against_numpy(name):
    """On NumPy and on JAX arrays alike, type kept; and back, where there is a way back."""
    transform, wanted = TRANSFORMS[name]
    for x in (X, jnp.asarray(X)):
        value = run(transform, x)
        assert isinstance(value, type(x)) and value.dtype == np.float32
        np.testing.assert_array_equal(value, wanted)
        if transform.inverse is not None:
            np.testing.assert_array_equal(run(transform.inverse, value), X)


def test_which_have_no_inverse():
    """What loses or repeats entries."""
    assert {name for name, (transform, _) in TRANSFORMS.items() if transform.inverse is None} == {
        "tile", "shorter", "copies", "means", "means for each layer",
    }  # fmt: skip


def test_noise_is_a_function_of_seed_and_path():
    """As large as asked, the same again, another for another leaf or seed."""
    x = np.random.default_rng(0).normal(size=(100, 100)).astype(np.float32)
    draw = lambda seed, path: Noise(0.1, seed).parts({(): x}, Goal(path, {}))[()]  # noqa: E731
    moved = draw(0, "a")
    assert np.std(moved - x) == pytest.approx(0.1, rel=0.03)
    assert moved.dtype == np.float32 and moved.tobytes() == draw(0, "a").tobytes()
    assert (draw(0, "b") != moved).all(axis=None) or (draw(0, "b") != moved).mean() > 0.99
    assert (draw(1, "a") != moved).mean() > 0.99


# ---- patterns -----------------------------------------------------------------------------------------------------


def test_patterns():
    """Numbers, words, ranges and text; and back to the path."""
    cases = {
        "l/{layer}/w": ("l/12/w", {"layer": 12}),
        "l/{part:w1|w3}": ("l/w3", {"part": 1}),
        "l/{layer:3..9}/{rest:*}": ("l/5/a/b", {"layer": 2, "rest": "a/b"}),
        "l/{layer:1..9..2}": ("l/7", {"layer": 3}),
    }
    for pattern, (path, places) in cases.items():
        assert paths.match(pattern, path) == places
        assert paths.fill(pattern, places) == path
    assert paths.match("l/{layer}/w", "l/01/w") is None
    assert paths.match("l/{layer:1..9..2}", "l/2") is None
    assert paths.match("a.b", "axb") is None
    for pattern in ("{a}{a}", "{}", "{a:x|x}", "{a:5..3}"):
        with pytest.raises(ValueError, match="pattern"):
            paths.fields(pattern)


# ---- trees --------------------------------------------------------------------------------------------------------

EXPERTS = 12
PUBLISHED = {
    f"model.layers.{layer}.experts.{e}.w{w}": np.full((2, 3), 100 * layer + 10 * e + w, np.float32) + np.arange(3, dtype=np.float32)
    for layer in range(2) for e in range(EXPERTS) for w in (1, 3)
}  # fmt: skip
OURS = {f"experts/{part}": np.zeros((2, EXPERTS, 3, 2), np.float32) for part in ("gate", "up")}
CONVERT = (
    Rule(
        "model.layers.{layer}.experts.{e}.w{part:1|3}",
        "experts/{part:gate|up}",
        (Transpose((1, 0)), Stack("e", 0), Stack("layer", 0)),
    ),
)


def test_twelve_experts_in_numeric_order():
    """0, 1, 2, …, 10, 11 and never 0, 1, 10, 11, 2, however the tree is sorted; and the plan says so before anything is read."""
    source = {path: PUBLISHED[path] for path in sorted(PUBLISHED)}
    made = apply(CONVERT, source, OURS)
    for i, part in enumerate(("gate", "up")):
        for layer in range(2):
            np.testing.assert_array_equal(
                made[f"experts/{part}"][layer, :, 0, 0], 100 * layer + 10 * np.arange(EXPERTS) + (1, 3)[i]
            )
    reads = list(plan(CONVERT, source, OURS)["experts/up"].reads.values())
    assert reads == [f"model.layers.{layer}.experts.{e}.w3" for layer in range(2) for e in range(EXPERTS)]


def test_there_and_back():
    """The inverse rules give the published tree, every leaf of it from one leaf of ours."""
    made = apply(CONVERT, PUBLISHED, OURS)
    back = inverse(CONVERT)
    again = apply(back, made, PUBLISHED)
    assert again.keys() == PUBLISHED.keys()
    for path, value in PUBLISHED.items():
        np.testing.assert_array_equal(again[path], value)
    assert all(len(job.reads) == 1 for job in plan(back, made, PUBLISHED).values())


def test_square_matrices_are_not_transposed():
    """A square matrix fits either way: what was not asked to turn does not turn."""
    square = np.arange(9, dtype=np.float32).reshape(3, 3)
    target = {"b": np.zeros((3, 3), np.float32)}
    np.testing.assert_array_equal(apply([Rule("a", "b")], {"a": square}, target)["b"], square)
    np.testing.assert_array_equal(apply([Rule("a", "b", (Transpose((1, 0)),))], {"a": square}, target)["b"], square.T)


def test_fresh_dropped_and_same():
    """Three ways to say what becomes of leaves."""
    source = {"old": X, "kept": X, "step": np.int32(7)}
    target = {"new": X + 1, "kept": np.zeros_like(X), "step": np.int32(0)}
    rules = [drop("old"), fresh("new", Scale(2.0)), drop("step"), fresh("step")]
    made = apply(rules, source, target, same=True)
    assert list(made) == list(target) and made["step"] == 0
    np.testing.assert_array_equal(made["new"], 2 * (X + 1))
    np.testing.assert_array_equal(made["kept"], X)
    for rule in rules:
        with pytest.raises(RuleError, match="turned round"):
            _ = rule.inverse


A = {"a": np.zeros((2, 3), np.float32)}
B = {"b": np.zeros((2, 3), np.float32)}
WRONG = {
    "a target that no rule writes": ([Rule("a", "b")], A, B | {"c": X}, ["no rule writes c", "fresh"]),
    "a target written twice": ([Rule("a", "b"), Rule("{x:a}", "b", (Stack("x", 0),))], A, B, ["b is written by rule a -> b and by"]),
    "a source that no rule reads": ([Rule("a", "b")], A | {"c": X}, B, ["no rule reads c", "drop"]),
    "a source that is not there": ([Rule("c", "b"), drop("a")], A, B, ["b: rule c -> b lacks c"]),
    "a source both read and dropped": ([Rule("a", "b"), drop("{x:*}")], A, B, ["a is read, and dropped by rule {x:*}"]),
    "another shape": ([Rule("a", "b", (Transpose((1, 0)),))], A, B, ["b is float32[2, 3]", "makes float32[3, 2]", "[[2, 3]]"]),
    "another type": ([Rule("a", "b")], {"a": A["a"].astype(np.int32)}, B, ["b is float32", "makes int32"]),
    "fresh without a value": ([drop("a"), fresh("b")], A, {"b": jax.ShapeDtypeStruct((2, 3), np.float32)}, ["b: rule fresh -> b keeps"]),
    "a step that does not fit": ([Rule("a", "b", (Split(0, 4, 0),))], A, B, ["b: rule a -> b: axis 0 of (2, 3)", "4 equal parts"]),
    "an expert that is missing": (CONVERT, {k: v for k, v in PUBLISHED.items() if k != "model.layers.1.experts.10.w3"}, OURS,
                                  ["experts/up: rule", "lacks model.layers.1.experts.10.w3"]),
    "the first expert missing": (CONVERT, {k: v for k, v in PUBLISHED.items() if ".experts.0." not in k}, OURS,
                                 ["lacks model.layers.0.experts.0.w1, model.layers.1.experts.0.w1;"]),
    "a part without a target": ((Rule("a", "{x:b|c}", (Unstack("x", 0),)),), A, {"b": A["a"][0]}, ["lacks c;"]),
    "an axis longer than its targets": ((Rule("a", "b/{e}", (Unstack("e", 1),)),), A, {"b/0": A["a"][:, 0], "b/1": A["a"][:, 0]},
                                        ["has not one entry for each of the 2 {e}"]),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_strict(name):
    """One error in one line: leaves, rule and remedy."""
    rules, source, target, words = WRONG[name]
    with pytest.raises(RuleError) as caught:
        apply(rules, source, target)
    text = str(caught.value)
    assert "\n" not in text and caught.value.exit_code == 2
    for word in words:
        assert word in text, text


def test_all_that_is_wrong_is_said_at_once():
    """Names are checked before any array is read."""
    with pytest.raises(RuleError, match=r"no rule writes b, c.*no rule reads a"):
        plan([], ["a"], ["b", "c"])


def test_rules_that_say_nothing_are_refused():
    """A field on one side needs the step that makes it or takes it; text cannot be counted; words go in pairs."""
    for source, target, steps in (
        ("a/{e}", "b", ()),
        ("a", "b/{e}", ()),
        ("a/{e}", "b", (Unstack("e", 0),)),
        ("a/{e:*}", "b", (Stack("e", 0),)),
        ("a/{e:x|y}", "b/{e:x|y|z}", ()),
    ):
        with pytest.raises(ValueError, match="rule a"):
            Rule(source, target, steps)


def test_the_page_runs():
    """The code of docs/surgery.md, and its rules on a tree of two layers, three experts and a buffer that nobody wants."""
    page = (pathlib.Path(__file__).parents[2] / "docs" / "surgery.md").read_text().split("## Rules")[1]
    code = textwrap.dedent("\n".join(line for line in page.splitlines() if line.startswith("    ") or not line.strip()))
    theirs = {
        f"layers.{layer}.experts.{e}.w{w}.weight": np.full((2, 5), 10 * layer + e + w, np.float32)
        for layer in range(2) for e in range(3) for w in (1, 3)
    }  # fmt: skip
    wanted = {f"experts/{part}": np.zeros((2, 3, 5, 2), np.float32) for part in ("gate", "up")}
    names = {}
    exec(compile(code, "docs/surgery.md", "exec"), names)
    ours = names["apply"](names["rules"], theirs | {"rotary.cos": X}, wanted)
    np.testing.assert_array_equal(ours["experts/up"][1, :, 0, 0], [13, 14, 15])
