"""Every code block of the pages is run: Python as it stands, commands up to where their work begins, some of them to their end.

docs/new_router.md is more than that: its router passes the battery of all routers.
"""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import battery
import ml_dtypes
import numpy as np
import oracle_routers
import pages
import pytest
import safetensors.numpy
from checkpoint import published_models
from data import tiny_tokenizer
from models.published import leaves
from oracle_routers import Choice, edge, ranked
from pages import PAGES, ROOT
from train import small

from moejax import config
from moejax.checkpoint.hugging_face import outline
from moejax.checkpoint.hugging_face.families import FAMILIES, deepseek
from moejax.errors import UserError
from moejax.moe import layer, routers
from moejax.train import choices

# How ml_collections reads experiment files.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")

SHOWN = {
    ("README.md", "held-out bits per byte"): "what make run prints",
    ("README.md", "configs/"): "the tree of files, which tests/test_house.py holds",
}
"""Blocks without a language that show something, by how they begin."""

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def furnish(here):
    """A folder as the pages have it: the repository's own files, and some notes."""
    for name in ("benchmarks", "configs", "docs", "examples", "moejax", "scripts", "tests", "Makefile", "setup.py"):
        (here / name).symlink_to(ROOT / name)
    (here / "notes").mkdir()
    for document in small.documents():
        (here / f"notes/{document.name}.md").write_bytes(document.text)
    (here / "README.md").write_text("A router of the mesh is a gate.\n" * 8)
    return here


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """With runs, as far as a command looks at them before its work begins."""
    here = furnish(tmp_path_factory.mktemp("checkout"))
    (here / "runs/tiny/checkpoints").mkdir(parents=True)
    (here / "runs/olmoe").mkdir()
    (here / "runs/olmoe/config.json").write_text(json.dumps(config.to_dict(config.Config())))
    return here


@pytest.fixture
def fresh(tmp_path):
    """With a published model. The run that README's Python makes is also that of its commands."""
    here = furnish(tmp_path)
    (here / "runs").mkdir()
    (here / "runs/mine").symlink_to("gshard")
    tree = published_models.CONFIGS["olmoe"] | {"vocab_size": 304, "num_experts": 4}
    model = published_models.read("olmoe", tree)
    shapes = outline.shapes(FAMILIES["olmoe"].rules(model), leaves(model))
    rng = np.random.default_rng(0)
    weights = {name: (0.1 * rng.normal(size=shape)).astype(ml_dtypes.bfloat16) for name, shape in shapes.items()}
    published_models.write(tiny_tokenizer.folder(here / "OLMoE-1B-7B"), "olmoe", weights, tree)
    return here


# ---- blocks -------------------------------------------------------------------------------------------------------


def shown(block):
    return any(page == block.page and block.code.startswith(start) for page, start in SHOWN)


@every_page
def test_every_block_is_of_a_kind(page):
    """A new one that is neither Python, nor commands, nor data wants the language text, or a line in SHOWN."""
    assert not [f"{b.page}:{b.line} {b.code[:60]!r}" for b in pages.blocks_of(page) if b.kind is None and not shown(b)]


def test_the_blocks_that_are_shown_are_there():
    found = [block for page in PAGES for block in pages.blocks_of(page)]
    assert all(any(b.page == page and b.code.startswith(start) for b in found) for page, start in SHOWN)


@pytest.mark.parametrize(
    "code, fence, kind",
    [
        ("x = f(1)\n", "", "python"), ("f(1)\n", "", "python"), ("make run  # trains\npython x.py\n", "", "shell"),
        ('{"a": 1}\n[1]\n', "", "json"), ("a\n", "text", "text"),
        ("a -> b\n", "", None), ("configs\n", "", None), ("make it so, or\nelse\n", "", None), ("a\n", "yaml", None),
    ],
)  # fmt: skip
def test_kinds_of_blocks(code, fence, kind):
    assert pages.blocks.kind(code, fence) == kind


@every_page
def test_data_is_read(page, tmp_path):
    """JSON on a page is a file of questions, which scripts/evaluate.py reads."""
    for block in pages.blocks_of(page):
        if block.kind == "json":
            (tmp_path / "questions.jsonl").write_text(block.code)
            assert choices.read(tmp_path / "questions.jsonl")


# ---- commands -----------------------------------------------------------------------------------------------------


@every_page
def test_commands_are_right(page, checkout, monkeypatch):
    """Of blocks and between backticks: a script takes its flags and options, a file is there, make has the target, pip the extra."""
    monkeypatch.chdir(checkout)
    wrong = {}
    for line in pages.commands_of(page):
        try:
            right(line)
        except (AssertionError, UserError) as error:
            wrong[line] = str(error)
    assert not wrong


def right(line):
    first, *rest = line.split()[0], *pages.words(line)
    if first == "make":
        targets = re.findall(r"^([\w-]+):", Path("Makefile").read_text(), re.M)
        assert {word for word in rest if "=" not in word} <= set(targets)
    elif first == "pip":
        extras = {extra for word in rest for extra in re.findall(r"\[(\w+)\]", word)}
        assert extras <= set(re.findall(r'^        "(\w+)":', Path("setup.py").read_text(), re.M))
    elif rest[0].startswith("scripts/"):
        pages.call(line)
    else:
        files = [word for word in rest if "/" in word]
        assert files and all(Path(file).exists() for file in files)


def test_a_wrong_command_is_found(checkout, monkeypatch):
    monkeypatch.chdir(checkout)
    for line, said in (
        ("python scripts/train.py --config=configs/tiny.py --workdir=runs/a --config.model.moe.top_q=1", "top_q"),
        ("python scripts/train.py --config=configs/tiny.py --workdir=runs/a --config.model.moe.top_k=99", "top_k=99"),
        ("python scripts/train.py --config=configs/tiny.py", "--workdir is missing"),
        ("python scripts/report.py --workdirs=runs/a", "workdirs"),
        ("python scripts/plan.py --config=configs/tiny.py --search=3", "--topology"),
        ("python scripts/bench.py blocks", "name one bench"),
    ):
        with pytest.raises(UserError, match=re.escape(said)):
            right(line)
    for line in ("make tests", "pip install moejax[all]", "python examples/jacobs_1992.py"):
        with pytest.raises(AssertionError):
            right(line)


@pytest.mark.slow
def test_python_and_commands_run(fresh):
    """The Python of every page as it stands, and the cheap commands to their end, in tiny form; one process for all."""
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    environment |= {"PYTHONPATH": str(ROOT / "tests"), "XLA_FLAGS": "--xla_backend_optimization_level=0"}
    process = subprocess.run(
        [sys.executable, pages.__file__], cwd=fresh, env=environment, capture_output=True, text=True, timeout=300
    )
    assert process.returncode == 0, process.stderr
    failed = json.loads(process.stdout.splitlines()[-1])
    assert not failed, "\n\n".join(f"{what}\n{how}" for what, how in failed.items())
    assert {line.split()[1][8:-3] for line in pages.cheap()} == pages.CHEAP
    assert (fresh / "runs/mine/report.html").is_file()
    ours, theirs = (
        safetensors.numpy.load_file(fresh / f"OLMoE-{name}/model.safetensors") for name in ("mine", "1B-7B")
    )
    assert ours.keys() == theirs.keys()


# ---- what is read off the sources ---------------------------------------------------------------------------------


@every_page
def test_directives_find_what_they_name(page):
    """Modules and names of the reference are there, and so are the tables that options name."""
    asked = page.read_text()
    directives = [b for b in pages.blocks_of(page) if b.kind == "directive" and "toctree" not in b.fence]
    assert (pages.reference.expanded(asked) != asked) == bool(directives)


def test_every_option_is_on_its_page():
    """Once, with its type and default as the dataclasses have them."""
    page = pages.reference.expanded((ROOT / "docs/options.md").read_text())
    found = re.findall(r"^````\{confval\} (\S+)\n:type: `(.*)`\n:default: `(.*)`\n\n(.+)$", page, re.M)
    wanted = {}

    def collect(part, path):
        for name, value in vars(part).items():
            if hasattr(value, "__dataclass_fields__"):
                collect(value, f"{path}{name}.")
            else:
                wanted[path + name] = value

    collect(config.Config(), "")
    assert {name: ast.literal_eval(default) for name, _, default, _ in found} == wanted and len(found) == len(wanted)
    assert all(text.strip() for *_, text in found)


def test_the_start_page_names_every_page():
    """In the list and in the tree beside it."""
    text = (ROOT / "docs/index.md").read_text()
    there = {page.stem for page in (ROOT / "docs").glob("*.md")} - {"index"}
    trees = "".join(b.code for b in pages.blocks_of(ROOT / "docs/index.md"))
    assert set(re.findall(r"\]\((\w+)\.md\)", text)) == there
    assert set(re.findall(r"^(?:.*<)?(\w+)>?$", trees, re.MULTILINE)) == there


# ---- pages whose code is more -------------------------------------------------------------------------------------


def plain(token, spec):
    """The reference: the best of each half, one token at a time."""
    half = spec.experts // 2
    parts = token.logits[:half], token.logits[half:]
    best = [ranked(part) for part in parts]
    margin = min(edge(part, order, 1) for part, order in zip(parts, best, strict=True))
    return Choice([best[0][0], half + best[1][0]], [True, True], 0, margin)


@pytest.fixture
def halves(monkeypatch, strict_dtypes):
    """The page's router, in the library's table while a test runs; its reference in the oracle's."""
    (code,) = [b.code for b in pages.blocks_of(ROOT / "docs/new_router.md") if b.kind == "python"]
    monkeypatch.setitem(routers.ROUTERS, "halves", None)  # so that it is gone afterwards
    monkeypatch.setitem(oracle_routers.CHOOSE, "halves", plain)
    exec(compile(code, "docs/new_router.md", "exec"), {})
    body = [line for line in code.splitlines() if line.strip() and not line.startswith(("import", "from"))]
    assert len(body) <= 20
    return config.MoE(num_experts=8, hidden=4, top_k=2, router="halves", capacity_factor=0.75)


def test_the_example_passes_the_battery(halves):
    """Oracle on 200 groups with ties, padding, causality, rerouting."""
    layer.check(halves, context=battery.SIZE)
    battery.check_oracle(halves, battery.draw(halves))
    battery.check_padding(halves)
    battery.check_causal(halves)
    experts = battery.call(halves, battery.draw(halves)).tokens["original"]
    valid = battery.draw(halves).valid
    assert (experts[valid][:, 0] < 4).all() and (experts[valid][:, 1] >= 4).all()
    assert len(np.unique(experts[valid])) == 8


def test_the_page_on_models_has_every_family():
    """In its table of fields and in that of parity; the example is the code that it says it is."""
    page = (ROOT / "docs/models.md").read_text()
    table, parity = (
        page.split("## Families")[1].split("**config.json")[0],
        page.split("## Is it")[1].split("## Fine")[0],
    )
    named = {
        name for line in re.findall(r"^\| (`.*?) \|", table, re.MULTILINE) for name in re.findall(r"`(\w+)`", line)
    }
    measured = {
        name for line in re.findall(r"^\| (\w.*?) \|", parity, re.MULTILINE) for name in re.findall(r"\w+", line)
    }
    assert named - {"model_type"} == FAMILIES.keys() and FAMILIES.keys() <= measured
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    source = Path(deepseek.__file__).read_text()
    assert all(part.strip() in source for part in code.split("\n\n\n"))
