"""Pages read off the sources: what a module offers, every option, every command. The sources are parsed and never imported.

A page asks with a block, and `expanded` puts Markdown in its place:

    members   MODULE [NAME …]: the module's docstring and its public names, or these
    options   every field of the config, section by section
    commands  every script with its docstring and flags
    root      FILE: a page at the root of the repository, its links as seen from docs/
"""

from __future__ import annotations

import ast
import functools
import json
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^```\{(members|options|commands|root)\}(.*)\n```$", re.MULTILINE)
SECTION = re.compile(r"^(Args|Returns|Raises):$", re.MULTILINE)
EXAMPLE = re.compile(r"^(?:Example:| {8}) (python .*)$", re.MULTILINE)
TABLE = re.compile(r"\b(moejax(?:\.[a-z_]+)+)\.([A-Z_]+)\b")


def expanded(page: str) -> str:
    """The page with each of its blocks replaced."""

    def put(found: re.Match[str]) -> str:
        kind, words = found[1], found[2].split()
        made = {"members": members, "options": options, "commands": commands, "root": root}[kind](*words)
        return "\n".join(made)

    return BLOCK.sub(put, page)


PAGES = {"README.md": "readme.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}


def root(file: str) -> Iterator[str]:
    def seen(link: re.Match[str]) -> str:
        path = link[1]
        return f"]({PAGES.get(path) or (path[5:] if path.startswith('docs/') else f'../{path}')})"

    yield re.sub(r"\]\((?!https?:|#)([^)]+)\)", seen, (ROOT / file).read_text())


# ---- modules ------------------------------------------------------------------------------------------------------


@functools.cache
def parsed(file: Path) -> ast.Module:
    return ast.parse(file.read_text(), str(file))


def file_of(module: str) -> Path:
    """The file of a dotted name; a package has its __init__."""
    path = ROOT / module.replace(".", "/")
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def members(module: str, *names: str) -> Iterator[str]:
    """The module and its public names, or these alone, which it may have from another."""
    tree = parsed(file_of(module))
    yield from (f"### {module}", "", f"```{{py:module}} {module}", "```", "", docstring(tree), "")
    for name in names or dict(public(tree)):
        yield from dict(public(parsed(home(module, name))))[name]


def home(module: str, name: str) -> Path:
    """The file that sets a name of a module."""
    file = file_of(module)
    for node in parsed(file).body:
        if name in (getattr(node, "name", None), *assigned(ast.Module([node], []))):
            return file
        if isinstance(node, ast.ImportFrom) and name in [alias.name for alias in node.names]:
            return home(str(node.module), name)
    raise ValueError(f"{module}.{name} is named in docs/ or by an option, and is not there")


def origin(module: str, name: str) -> str | None:
    """The full name of what a module calls by a name; None where it is not of the library."""
    head, _, rest = name.partition(".")
    for node in parsed(file_of(module)).body:
        if head in (getattr(node, "name", None), *assigned(ast.Module([node], []))):
            return f"{module}.{name}"
        if isinstance(node, ast.ImportFrom) and head in [alias.name for alias in node.names]:
            return f"{node.module}.{name}" if str(node.module).split(".")[0] == "moejax" else None
    return None


def assigned(tree: ast.Module | ast.ClassDef) -> dict[str, ast.expr]:
    """What names are set to."""
    pairs = {}
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            pairs[node.targets[0].id] = node.value
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value is not None:
            pairs[node.target.id] = node.value
    return pairs


def public(tree: ast.Module | ast.ClassDef, depth: int = 0) -> Iterator[tuple[str, list[str]]]:
    """(name, its block) of functions and classes, and of constants and fields that have a docstring; fields always."""
    for node, text in with_docstrings(tree):
        name = getattr(node, "name", "") or getattr(getattr(node, "target", None) or node.targets[0], "id", "_")
        if name.startswith("_"):
            continue
        if isinstance(node, ast.FunctionDef):
            yield name, function(node, depth)
        elif isinstance(node, ast.ClassDef):
            yield name, kind(node, depth)
        elif text or depth:
            yield name, block("attribute" if depth else "data", name, text, depth, **constant(node))


def with_docstrings(tree: ast.Module | ast.ClassDef) -> Iterator[tuple[ast.stmt, str]]:
    """Definitions and assignments, each with the string under it."""
    for node, after in zip(tree.body, [*tree.body[1:], None], strict=True):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node, ast.get_docstring(node) or ""
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            said = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
            yield node, " ".join(str(after.value.value).split()) if said else ""


def constant(node: ast.Assign | ast.AnnAssign) -> dict[str, str]:
    """Type and value, where they fit a line."""
    kind = {"type": source(node.annotation)} if isinstance(node, ast.AnnAssign) else {}
    value = "" if node.value is None else ast.unparse(node.value)
    return kind | ({"value": value} if 0 < len(value) <= 60 else {})


def function(node: ast.FunctionDef, depth: int) -> list[str]:
    decorators = {ast.unparse(d) for d in node.decorator_list}
    returns = source(node.returns) if node.returns else ""
    if decorators & {"property", "functools.cached_property"}:
        return block("property", node.name, docstring(node), depth, type=returns)
    bare = bool(decorators & {"staticmethod"}) or not depth
    heading = f"{node.name}({arguments(node, bare)})" + (f" -> {returns}" if returns else "")
    return block("method" if depth else "function", heading, docstring(node), depth)


def kind(node: ast.ClassDef, depth: int) -> list[str]:
    """A class with its fields and public methods."""
    made = [part for part in node.body if isinstance(part, ast.FunctionDef) and part.name == "__init__"]
    heading = node.name + (f"({arguments(made[0], bare=False)})" if made else "")
    inside = [line for _, lines in public(node, depth + 1) for line in lines]
    error = any(ast.unparse(base).endswith(("Error", "Exception")) for base in node.bases)
    return block("exception" if error else "class", heading, "\n".join([docstring(node), "", *inside]), depth)


def arguments(node: ast.FunctionDef, bare: bool) -> str:
    """The parameters; without the first, which is the object, unless bare."""
    given = node.args
    if not bare:
        given = ast.arguments(**{name: getattr(given, name) for name in given._fields} | {"args": given.args[1:]})
    return source(given)


def source(node: ast.AST) -> str:
    """As it is written, less the space that jaxtyping wants before a single name."""
    return ast.unparse(node).replace("' ", "'")


def block(directive: str, heading: str, text: str, depth: int, **fields: str) -> list[str]:
    fence = "`" * (8 - 2 * depth)
    said = [f":{name}: {json.dumps(value)}" for name, value in fields.items() if value]
    said += [":no-contents-entry:"] if directive in ("attribute", "property") else []
    return [f"{fence}{{py:{directive}}} {heading}", *said, "", text, fence, ""]


def docstring(node: ast.Module | ast.ClassDef | ast.FunctionDef) -> str:
    """Its Markdown, with the sections of parameters as fields."""
    text, *sections = SECTION.split(ast.get_docstring(node) or "")
    lines = [text.rstrip()]
    for name, body in zip(sections[::2], sections[1::2], strict=True):
        joined = re.sub(r"\n {4,}", " ", body.rstrip("\n"))
        stripped = [line.strip() for line in joined.splitlines() if line.strip()]
        if name == "Returns":
            lines += ["", f":returns: {' '.join(stripped)}"]
        else:
            field = {"Args": "param", "Raises": "raises"}[name]
            lines += ["", *(f":{field} {line}" for line in stripped)]
    return "\n".join(lines)


# ---- options ------------------------------------------------------------------------------------------------------


def options() -> Iterator[str]:
    """Sections in the order in which `Config` has them, each option once with type, default and meaning."""
    files = sorted((ROOT / "moejax").glob("config*.py"))
    kinds = {n.name: n for file in files for n in parsed(file).body if isinstance(n, ast.ClassDef)}
    yield from section(kinds, "Config", "")


def section(kinds: dict[str, ast.ClassDef], name: str, path: str) -> Iterator[str]:
    """Its own options first, then the sections in it."""
    fields = [(n, text) for n, text in with_docstrings(kinds[name]) if isinstance(n, ast.AnnAssign)]
    yield from (f"## {path.rstrip('.') or 'config'}", "", ast.get_docstring(kinds[name]) or "", "")
    for node, text in fields:
        if ast.unparse(node.annotation) not in kinds:
            heading = f"````{{confval}} {path}{source(node.target)}"
            yield from (
                heading,
                f":type: `{source(node.annotation)}`",
                f":default: `{source(node.value)}`",
                "",
                with_names(text),
                "````",
                "",
            )
    for node, _ in fields:
        if (kind := ast.unparse(node.annotation)) in kinds:
            yield from section(kinds, kind, f"{path}{ast.unparse(node.target)}.")


def with_names(text: str) -> str:
    """The text with what is in each table that it names, where it does not say so itself."""

    def put(found: re.Match[str]) -> str:
        value = assigned(parsed(home(found[1], found[2])))[found[2]]
        keys = value.keys if isinstance(value, ast.Dict) else getattr(value, "elts", [])
        names = [str(key.value) for key in keys if isinstance(key, ast.Constant)]
        if not names:
            raise ValueError(f"{found[0]}, which an option names, is no table with names to list")
        said = all(re.search(rf"\b{name}\b", text) for name in names)
        return f"`{found[0]}`" + ("" if said else f" ({', '.join(f'`{name}`' for name in names)})")

    return TABLE.sub(put, text)


# ---- commands -----------------------------------------------------------------------------------------------------


def commands() -> Iterator[str]:
    """A section for each script: its docstring, and its flags with their defaults."""
    for file in sorted((ROOT / "scripts").glob("*.py")):
        text = EXAMPLE.sub(lambda found: f"Example:\n\n    {found[1]}\n", ast.get_docstring(parsed(file)) or "")
        yield from (f"## {file.name}", "", text, "", "| flag | default | |", "|---|---|---|")
        yield from (f"| {' | '.join(cells)} |" for cells in flags(parsed(file)))
        yield ""


def flags(tree: ast.Module) -> Iterator[tuple[str, str, str]]:
    """(flag, default, help) of absl's flags and of argparse's."""
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        name = ast.unparse(call.func)
        named = {keyword.arg: keyword.value for keyword in call.keywords}
        if name.endswith("config_flag"):
            yield "`--config`", "", "experiment file, with `--config.key=value` for any option"
        elif ".DEFINE_" in name:
            flag, default, *rest = call.args
            yield f"`--{ast.literal_eval(flag)}`", value_of(default), help_of(rest[-1] if "enum" in name else rest[0])
        elif name.endswith(".add_argument"):
            yield f"`{ast.literal_eval(call.args[0])}`", value_of(named.get("default")), help_of(named["help"])


def value_of(node: ast.expr | None) -> str:
    """A default as one writes it on the command line; empty for none."""
    if node is None or (isinstance(node, ast.Constant) and node.value in (None, False)):
        return ""
    if isinstance(node, (ast.Constant, ast.List)):
        value = ast.literal_eval(node)
        return f"`{','.join(map(str, value)) if isinstance(value, list) else value}`"
    return f"`{ast.unparse(node)}`"


def help_of(node: ast.expr) -> str:
    """The text, with what a format string puts in by its name."""
    parts = node.values if isinstance(node, ast.JoinedStr) else [node]
    found = [p.value if isinstance(p, ast.Constant) else ast.unparse(p.value) for p in parts]
    return "".join(map(str, found)).replace("|", "\\|")
