"""scripts/plan.py as a user runs it: accounts, comparisons, serving, plans; what is wrong is one line on stderr and exit code 2."""

import json

import forked
import pytest
from aot import programs
from plan.answers import answer
from train import small

pytestmark = pytest.mark.slow

TINY = "--config=configs/tiny.py"
COUNTED = "--config=configs/models/qwen3_5_35b_a3b.py"
DENSE, SPARSE = "--config=configs/models/dense_70b.py", "--compare=configs/models/sparse_400b.py"
COMPILES = "--config.mesh.expert=4", "--cache="


def answering(said):
    """Python that puts a process in the compiler's place which says this of every request."""
    line = f"import sys; sys.stdin.read(); print({json.dumps(said)!r})"
    head = "import sys; from moejax.plan import aot; aot.libtpu = lambda: None"
    return f"{head}; aot.COMPILER = (sys.executable, '-I', '-S', '-c', {line!r})"


STAND_IN, TOO_LARGE = answering(answer(devices=4)), answering(answer(used=500e9, fits=False))
NO_LIBTPU = """
import importlib.util
from moejax.plan import aot
found = importlib.util.find_spec
importlib.util.find_spec = lambda name: None if name == "libtpu" else found(name)
aot.LIBTPU = "absent"
"""
SLICE = "--topology=v5p:2x2x1"
WRONG = {
    "no config": ([], "--config is missing"),
    "missing config": (["--config={tmp}/none.py"], "none.py"),
    "unknown chip": ([TINY, "--topology=v9:2x2"], "choose one of v4, v5e, v5p, v6e, tpu7x, h100, h200"),
    "no shape": ([TINY, "--topology=v5p"], "v5p:8x8x16"),
    "another number of dimensions": ([TINY, "--topology=v5p:2x2"], "3 dimension(s)"),
    "larger than any slice": ([TINY, "--topology=v5e:64x64"], "--slices"),
    "a gpu": ([TINY, "--topology=h200:8"], "choose a chip from v4, v5e, v5p, v6e, tpu7x"),
    "unknown axis": ([TINY, SLICE, "--mesh=experts=4"], "data, fsdp, expert, tensor, context"),
    "no number": ([TINY, SLICE, "--mesh=expert=four"], "'expert=four' is not AXIS=SIZE"),
    "nothing of an axis": ([TINY, SLICE, "--mesh=expert=0"], "at least 1"),
    "an axis twice": ([TINY, SLICE, "--mesh=expert=2,expert=4"], "each once"),
    "another number of devices": ([TINY, SLICE, "--mesh=expert=3"], "the product of --mesh must be 4"),
    "not on the torus": ([TINY, "--topology=v5p:4x4x4", "--mesh=fsdp=8,expert=8"], "whole dimensions of (4, 4, 4)"),
    "a mesh that does not divide": (
        [TINY, SLICE, "--mesh=expert=4", "--config.model.moe.num_experts=6"],
        "mesh.expert=4",
    ),
    "counted and compiled": ([COUNTED, SLICE], "counted, not built"),
    "mesh of nothing": ([TINY, "--mesh=expert=4"], "add --topology"),
    "slices of nothing": ([TINY, "--slices=2"], "add --topology"),
    "step of nothing": ([TINY, "--step=decode"], "add --topology"),
    "search with a mesh": ([TINY, SLICE, "--search=2", "--mesh=expert=4"], "leave out --mesh"),
    "search of another step": ([TINY, SLICE, "--search=2", "--step=decode"], "--step=decode"),
    "unknown step": ([TINY, SLICE, "--step=sleep"], "train|eval|prefill|decode"),
    "price of nothing": ([TINY, "--price=2"], "add --serving"),
    "a price below nothing": ([TINY, "--serving=v5e", "--price=-1"], "non-negative"),
    "unknown chip to serve on": ([TINY, "--serving=v9"], "choose one of v4"),
    "nothing to compare": ([TINY, "--compare={tmp}/none.py"], "is not an experiment file"),
    "something else to compare": ([TINY, "--compare={tmp}/other.py"], "no get_config()"),
    "broken file to compare": ([TINY, "--compare={tmp}/broken.py"], "broken.py"),
    "no compiler": ([TINY, SLICE, "--cache="], "`make tpu`", NO_LIBTPU),
    "cache below a file": (
        [TINY, SLICE, "--mesh=expert=4", "--cache={tmp}/other.py/cache"],
        "choose another folder",
        STAND_IN,
    ),
}
RIGHT = {
    "help": (["--help"],),
    "account": ([TINY],),
    "account as json": ([TINY, "--json"],),
    "counted": ([COUNTED, "--json"],),
    "compared": ([DENSE, SPARSE],),
    "compared as json": ([DENSE, SPARSE, "--json"],),
    "served": ([TINY, "--serving=v5e", "--price=1.2", "--api_price=0.5"],),
    "served as json": ([TINY, "--serving=v5e", "--price=1.2", "--context=1000", "--json"],),
    "compiled": ([TINY, *COMPILES, SLICE], STAND_IN),
    "compiled as json": ([TINY, *COMPILES, SLICE, "--mesh=fsdp=2,expert=2", "--json"], STAND_IN),
    "too large": ([TINY, *COMPILES, SLICE], TOO_LARGE),
    "searched": ([TINY, *COMPILES, SLICE, "--search=1"], STAND_IN),
    "searched as json": ([TINY, *COMPILES, SLICE, "--search=1", "--json"], STAND_IN),
}


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """(exit code, stdout, stderr) by name."""
    tmp = tmp_path_factory.mktemp("plan")
    (tmp / "other.py").write_text("x = 1\n")
    (tmp / "broken.py").write_text("def get_config(:\n")
    cases = {name: (arguments, *before) for name, (arguments, _, *before) in WRONG.items()} | RIGHT
    asked = [
        {"arguments": [a.format(tmp=tmp) for a in arguments], "before": "".join(before)}
        for arguments, *before in cases.values()
    ]
    modules = [
        "moejax.cli",
        "moejax.plan.pods",
        "moejax.plan.tables",
        "moejax.plan.planned",
        "moejax.plan.costs",
        "moejax.plan.programs",
    ]
    return dict(zip(cases, forked.answers("plan", modules, asked), strict=True))


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_one_line(answers, name):
    code, out, err = answers[name]
    assert code == 2 and out == "", (code, out, err)
    last = err.splitlines()[-1]
    assert last.startswith("error: ") and WRONG[name][1] in last and "Traceback" not in err
    assert all(line.startswith("compiling ") for line in err.splitlines()[:-1])


def said(answers, name):
    """What a command that went well printed; people wait for lines on stderr that start with `compiling`."""
    code, out, err = answers[name]
    assert code == 0, err
    assert all(line.startswith("compiling ") for line in err.splitlines()), err
    return json.loads(out) if "json" in name or name == "counted" else out


def test_help(answers):
    assert "Example: python scripts/plan.py --config=" in said(answers, "help")


def test_accounts(answers):
    """A token meets a part of a sparse model, less without embeddings; a counted model has the account that its publisher gives."""
    text, found = said(answers, "account"), said(answers, "account as json")
    active = found["active_parameters"]
    assert found["total_parameters"] > active["A"] > active["B"] > active["C"] > 0
    assert f"{found['total_parameters']:,}" in text and f"A {active['A']:,} with both embeddings" in text
    assert found["account"]["parameters"] == {"total": found["total_parameters"], "active": active}
    counted = said(answers, "counted")
    assert (
        counted["name"].startswith("qwen3_5")
        and 34e9 < counted["total_parameters"] < 36e9
        and 2e9 < counted["active_parameters"]["A"] < 4e9
    )


def test_introductions(answers):
    text, found = said(answers, "compared"), said(answers, "compared as json")
    assert "dense_70b" in text and "sparse_400b" in text and found["comparison"]


def test_serving(answers):
    """Chips, bytes and tokens; with a price the cost of a million tokens."""
    text, found = said(answers, "served"), said(answers, "served as json")
    assert "v5e" in text and found["serving"] and found["costs"] and len(found["costs"]) == len(found["serving"])


def test_plans(answers):
    """The mesh of --mesh, or the config's own; tables for people, the same numbers for programs; what does not fit is no error."""
    found = said(answers, "compiled as json")
    (plan,) = found["plans"]
    assert plan["mesh"] == {"fsdp": 2, "expert": 2} and plan["fits"] and plan["roofline"]["bound"] == "matrix"
    text = said(answers, "compiled")
    assert "v5p:2x2x1" in text and "expert=4" in text and "matrix units" in text
    assert "does not fit: 500.0 of" in said(answers, "too large")


def test_searches(answers):
    """One mesh is compiled and said; it comes first if it fits."""
    text, found = said(answers, "searched"), said(answers, "searched as json")
    (ranked,) = found["search"]
    assert found["plans"] == [] and ranked["topology"] == "v5p:2x2x1"
    assert [c["compiled"] for c in ranked["candidates"]].count(True) == 1 and ranked["candidates"][0]["fits"]
    assert "compiler" in text and "estimate" in text and answers["searched"][2].count("compiling ") == 1


@programs.MARKS[1]
def test_too_little_memory():
    """The compiler itself is stopped before it takes more than it may."""
    code, out, err = small.finish(small.start("plan", TINY, SLICE, "--mesh=expert=4", "--memory_gb=0.1", "--cache="))
    assert code == 2 and out == "" and "took more than 0.1 GB" in err.splitlines()[-1] and "Traceback" not in err
