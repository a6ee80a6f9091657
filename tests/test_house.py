"""The rules of the house, read off the sources: who imports whom, who names what, what nothing reads, how long a file is."""

import ast
import dataclasses
import pathlib
import re

import pytest

from moejax import config

ROOT = pathlib.Path(__file__).parent.parent
LIBRARY = sorted((ROOT / "moejax").rglob("*.py"))
EVERYTHING = [
    p
    for folder in ("moejax", "scripts", "configs", "tests", "benchmarks")
    for p in sorted((ROOT / folder).rglob("*.py"))
]

LEVELS = [
    {"errors", "compat", "config_attention", "config_moe", "config_run", "config_transfer", "memory"},
    {"arrays", "config"},
    {"mesh", "sharding", "collectives"},
    {"kernels"},
    {"moe"},
    {"layers"},
    {"models"},
    {"data", "checkpoint"},
    {"train"},
    {"plan", "report"},
    {"sweep", "study"},
    {"bench"},
    {"cli"},
]
"""Imports go from a lower line to a higher one, or stay inside a folder. `config` may be read by all below it, errors by all."""

AXES = {"data", "fsdp", "expert", "tensor", "context"}
TAKES_AXES = {
    *(
        "psum",
        "pmean",
        "pmax",
        "pmin",
        "psum_scatter",
        "all_gather",
        "all_to_all",
        "ragged_all_to_all",
        "ppermute",
        "pshuffle",
    ),
    *("axis_index", "axis_size", "pcast", "PartitionSpec", "P", "NamedSharding"),
}
SECTIONS = {config.MoE: "moe", config.Model: "model", config.Data: "data", config.Mesh: "mesh", config.Train: "train"}
SECTIONS |= {config.Checkpoint: "checkpoint", config.Transfer: "transfer", config.Config: "config"}


def tree(path):
    return ast.parse(path.read_text(), str(path))


def imports(module):
    """Full dotted names of what a module imports, at its head or inside functions."""
    for node in ast.walk(module):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: write the import from the root"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def folder(path):
    """`moe` of moejax/moe/router.py, `mesh` of moejax/mesh.py."""
    return path.relative_to(ROOT / "moejax").parts[0].removesuffix(".py")


def level(name):
    found = [i for i, names in enumerate(LEVELS) if name in names]
    assert found, f"moejax/{name} has no place in LEVELS: say what it stands on"
    return found[0]


def uphill(name, module):
    """Imports of moejax that a file in `name` may not make."""
    for imported in imports(module):
        parts = imported.split(".")
        if (
            parts[0] == "moejax"
            and len(parts) > 1
            and parts[1] not in (name, "__version__")
            and level(parts[1]) >= level(name)
        ):
            yield imported


def named_axes(module):
    """Lines that name a mesh axis: in a collective or a spec, or as a key of a mesh's shape; and imports of PartitionSpec."""
    for node in ast.walk(module):
        if isinstance(node, ast.Call):
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            inside = ast.walk(node) if name in TAKES_AXES else []
            parts = [constant for constant in inside if isinstance(constant, ast.Constant)]
        elif isinstance(node, ast.Subscript) and getattr(node.value, "attr", "") == "shape":
            parts = [node.slice] if isinstance(node.slice, ast.Constant) else []
        else:
            parts = []
        yield from (part.lineno for part in parts if part.value in AXES)
    yield from (name for name in imports(module) if name.endswith(".PartitionSpec") or name == "jax.P")
    yield from (n.lineno for n in ast.walk(module) if isinstance(n, ast.Attribute) and n.attr in ("PartitionSpec", "P"))


def fields_read(module):
    """(section, field) for `moe.top_k`, `self.config.moe.top_k`, `cfg.top_k` where cfg is annotated config.MoE, and fields
    named by strings in a file that reads them with getattr."""
    kinds = {kind.__name__: section for kind, section in SECTIONS.items()}
    owner = {}
    for node in ast.walk(module):
        if isinstance(node, (ast.arg, ast.AnnAssign)) and node.annotation is not None:
            name = node.arg if isinstance(node, ast.arg) else getattr(node.target, "id", "")
            for part in ast.walk(node.annotation):
                if isinstance(part, ast.Attribute) and part.attr in kinds:
                    owner.setdefault(name, set()).add(kinds[part.attr])
    by_name = any(isinstance(n, ast.Call) and getattr(n.func, "id", "") == "getattr" for n in ast.walk(module))
    for node in ast.walk(module):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            name = getattr(node.value, "attr", getattr(node.value, "id", ""))
            for section in owner.get(name, set()) | {name}:
                yield section, node.attr
        elif by_name and isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield from ((section, node.value) for section in SECTIONS.values())


def unread(kinds, modules):
    """Fields of config dataclasses that no module reads."""
    read = {pair for module in modules for pair in fields_read(module)}
    return [
        f"{section}.{f.name}"
        for kind, section in kinds.items()
        for f in dataclasses.fields(kind)
        if (section, f.name) not in read
    ]


@pytest.mark.parametrize("path", LIBRARY, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_downhill(path):
    if path.name == "__init__.py" and path.parent.name == "moejax":
        return
    assert not list(uphill(folder(path), tree(path)))
    names = list(imports(tree(path)))
    if folder(path) in ("kernels", "moe"):
        assert not [name for name in names if name.split(".")[0] == "flax"], "arrays in, arrays out"
    if path != ROOT / "moejax/checkpoint/manager.py":
        assert not [name for name in names if name.split(".")[0] == "orbax"]


def test_the_import_rule_can_fail():
    assert list(uphill("kernels", ast.parse("def f():\n    from moejax.moe import layer"))) == ["moejax.moe.layer"]
    assert list(uphill("data", ast.parse("import moejax.checkpoint.manager"))) == ["moejax.checkpoint.manager"]
    assert not list(uphill("moe", ast.parse("from moejax.moe import names\nfrom moejax import config\nimport jax")))


def test_mesh_axes_are_named_in_two_files():
    allowed = {ROOT / "moejax/mesh.py", ROOT / "moejax/sharding.py"}
    found = {
        str(p.relative_to(ROOT)): lines for p in LIBRARY if p not in allowed and (lines := list(named_axes(tree(p))))
    }
    assert not found


def test_the_axis_rule_can_fail():
    for line in (
        'lax.psum(x, "fsdp")',
        'f(P(None, "expert"))',
        'mesh.shape["data"]',
        "from jax.sharding import PartitionSpec",
        "jax.P()",
    ):
        assert list(named_axes(ast.parse(line))), line
    assert not list(
        named_axes(ast.parse('sharding.spec("expert", None); axes.set(xlabel="expert"); data["context"]; x.shape[0]'))
    )


def test_every_option_is_read():
    """A config field that nothing reads is a lie to its user."""
    modules = [tree(path) for path in LIBRARY if path != ROOT / "moejax/config.py"]
    assert not unread(SECTIONS, modules)


def test_the_option_rule_can_fail():
    @dataclasses.dataclass
    class Made:
        up: int = 0
        read: int = 0

    source = "def f(moe: config.MoE, other):\n    return moe.read + other.up"
    assert unread({Made: "moe"}, [ast.parse(source)]) == ["moe.up"]
    assert unread({Made: "moe"}, [ast.parse("def f(m: config.MoE): return m.up + x.moe.read")]) == []


def test_files_are_short():
    """A file that outgrows 300 lines is two ideas."""
    assert EVERYTHING
    assert not [str(p.relative_to(ROOT)) for p in EVERYTHING if len(p.read_text().splitlines()) > 300]


def test_what_is_public_says_what_it_is():
    """Every module has a docstring, and every public function or class of more than four lines that is not a bare record."""
    missing = []
    for path in LIBRARY:
        module = tree(path)
        if module.body and path.name != "__init__.py" and not ast.get_docstring(module):
            missing.append(str(path.relative_to(ROOT)))
        for node in module.body:
            if (
                isinstance(node, (ast.FunctionDef, ast.ClassDef))
                and not node.name.startswith("_")
                and not ast.get_docstring(node)
            ):
                record = all(isinstance(part, (ast.AnnAssign, ast.Expr)) for part in node.body)
                if node.end_lineno - node.lineno > 4 and not record:
                    missing.append(f"{path.relative_to(ROOT)}:{node.lineno} {node.name}")
    assert not missing


def test_the_readme_names_every_file():
    """The captioned tree of the README has every module, script and experiment, and nothing that is gone."""
    block = (ROOT / "README.md").read_text().split("## The tree")[1]
    named = re.findall(r"^ +([\w.]+\.py)\b", block, flags=re.MULTILINE)
    there = [p.name for folder in ("moejax", "scripts", "configs", "examples") for p in (ROOT / folder).rglob("*.py")]
    assert sorted(n for n in named if not n.startswith(("test_", "conftest", "oracle"))) == sorted(
        n for n in there if n != "__init__.py"
    )
