"""Where documents come from: the interpreter's own standard library, a little text in six languages, or files. Near copies and the
held-out split."""

from __future__ import annotations

import ast
import dataclasses
import glob
import hashlib
import json
import os
import re
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path

from moejax.errors import UserError

COPY_LINE = 20
"""Bytes from which a stripped line counts in the comparison of documents; shorter ones occur by chance."""
COPY_SHARE = 0.7
"""Share of a document's distinct longer lines found in larger documents that makes it a near copy."""

_DRAW = b"heldout-24"
"""Salt of the held-out draw, one that holds out some of each label of Python's library at the default share."""
_SKIPPED_FOLDERS = re.compile(r"site-packages|dist-packages|ensurepip|__pycache__|config-.*|lib-dynload|(.*_)?tests?")
_PROSE_FILE = re.compile(r".*\.(txt|rst)|README.*|LICENSE.*")
_TABLE_LINE = re.compile(rb"""\s*(?!\"{3}|'{3})['"\d(\[{]""")


@dataclasses.dataclass(frozen=True)
class Document:
    """One text. Rows may mix documents, but attention and targets never cross from one to another."""

    name: str
    """Where it came from, unique within its source; documents are kept in the order of their names."""
    label: str
    """Kind of text, for analysis."""
    text: bytes
    ideal_bits: float | None = None
    """What the best possible reader pays for the text, where that is known."""


def python_paths() -> list[Path]:
    """The standard library's sources and texts, and the C headers, without tests; whatever of it is installed."""
    library, headers = (Path(sysconfig.get_path(key)) for key in ("stdlib", "include"))
    return [path for path in _walk(library) if path.suffix == ".py" or _PROSE_FILE.fullmatch(path.name)] + [
        path for path in _walk(headers) if path.suffix == ".h"
    ]


def python_documents() -> list[Document]:
    """Documents of the running interpreter, labelled `code`, `prose` or `tables`, sorted by name.

    `tables` are modules of which at least half of the non-blank, non-comment lines start like an entry of a literal:
    with a quote, a digit or an opening bracket. `prose` are help topics of pydoc and text files of which at least
    4/5 are letters and spaces; other text files are left out. Everything else is `code`.
    """
    roots = {Path(sysconfig.get_path("stdlib")): "lib", Path(sysconfig.get_path("include")): "include"}
    documents = []
    for path in python_paths():
        root = next(root for root in roots if path.is_relative_to(root))
        name, text = f"{roots[root]}/{path.relative_to(root).as_posix()}", _read(path)
        if name == "lib/pydoc_data/topics.py":
            documents += [Document(f"{name}/{topic}", "prose", body) for topic, body in _topics(text)]
        elif path.suffix in (".py", ".h"):
            documents.append(Document(name, "tables" if _is_table(text) else "code", text))
        elif _is_prose(text):
            documents.append(Document(name, "prose", text))
    if not any(document.text for document in documents):
        raise UserError(f"no sources under {list(map(str, roots))}; use your own text with --config.data.source=files")
    return sorted((d for d in documents if d.text.strip()), key=lambda document: document.name)


def language_paths() -> list[Path]:
    """A file for each language: twelve paragraphs written for this project, the same twelve in every language."""
    return sorted((Path(__file__).parent / "languages").glob("*.txt"))


def language_documents() -> list[Document]:
    """Each paragraph a document, labelled by its language: nothing but the language tells the labels apart."""
    return [
        Document(f"{path.stem}/{i:02}", path.stem, paragraph.strip())
        for path in language_paths()
        for i, paragraph in enumerate(_read(path).split(b"\n\n"))
    ]


def file_paths(pattern: str) -> list[Path]:
    """Files that match a glob (`~` and `**` work), sorted. UserError where there are none."""
    paths = [Path(path) for path in glob.glob(os.path.expanduser(pattern), recursive=True) if os.path.isfile(path)]
    if not paths:
        remedy = "give a quoted glob of text or .jsonl files, like 'notes/**/*.md'"
        raise UserError(f"files={pattern!r} matches no file; {remedy}")
    return sorted(paths)


def file_documents(pattern: str) -> list[Document]:
    """Documents of the files that match a glob, sorted by name.

    A text file is one document, labelled by its suffix without the dot (`plain` without one). A `.jsonl` file has
    one object per line with the key "text" and optionally "label" (default `jsonl`); blank lines are skipped.
    UserError on files without text and on lines that do not fit.
    """
    documents = []
    for path in file_paths(pattern):
        text = _read(path)
        if not text.strip():
            raise UserError(f"{path} holds no text; every file must hold some: remove it or narrow files={pattern!r}")
        if path.suffix == ".jsonl":
            documents += _json_lines(path, text)
        else:
            documents.append(Document(str(path), path.suffix[1:] or "plain", text))
    return sorted(documents, key=lambda document: document.name)


def drop_near_copies(documents: Iterable[Document]) -> tuple[list[Document], int]:
    """The documents without near copies of larger ones, sorted by name, and the number removed. Linear in the text.

    A document is a near copy if at least COPY_SHARE of its distinct lines of COPY_LINE bytes or more occur in the
    documents kept so far, from the largest to the smallest. One without such lines is compared as a whole.
    """
    kept, seen, removed = [], set(), 0
    for document in sorted(documents, key=lambda document: (-len(document.text), document.name)):
        stripped = {line.strip() for line in document.text.splitlines()}
        lines = {line for line in stripped if len(line) >= COPY_LINE} or {document.text}
        if len(lines & seen) >= COPY_SHARE * len(lines):
            removed += 1
        else:
            kept.append(document)
            seen |= lines
    return sorted(kept, key=lambda document: document.name), removed


def split(documents: Iterable[Document], heldout: float) -> dict[str, list[Document]]:
    """Documents -> train and heldout, both non-empty. A document's side depends on its text and the share alone."""
    if not 0 < heldout < 1:
        raise UserError(f"heldout={heldout} must lie between 0 and 1, such as 0.05")
    drawn = [(_uniform(document.text), document) for document in documents]
    parts = {"train": [d for u, d in drawn if u >= heldout], "heldout": [d for u, d in drawn if u < heldout]}
    for name, part in parts.items():
        if not part:
            draws = sorted(u for u, _ in drawn)
            two = len(set(draws)) > 1
            remedy = f"set heldout between {draws[0]:.4f} and {draws[-1]:.4f}" if two else "add different documents"
            raise UserError(f"heldout={heldout} of {len(drawn)} documents leaves {name} without any; {remedy}")
    return parts


def _uniform(text: bytes) -> float:
    """A number in [0, 1) drawn by the hash of the text; 48 bits, so that it is exact and below 1."""
    return int.from_bytes(hashlib.blake2b(text, digest_size=6, person=_DRAW).digest(), "big") / 2**48


def _walk(root: Path) -> Iterator[Path]:
    """Files below a folder, sorted, without folders of tests, of other packages and of this machine's build."""
    for folder, inner, names in os.walk(root):
        inner[:] = sorted(name for name in inner if not _SKIPPED_FOLDERS.fullmatch(name))
        kept = (Path(folder, name) for name in sorted(names) if not name.startswith(("test_", "_sysconfigdata")))
        yield from (path for path in kept if path.is_file())


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}; make it readable or leave it out") from error


def _is_table(text: bytes) -> bool:
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith(b"#")]
    return 2 * sum(bool(_TABLE_LINE.match(line)) for line in lines) >= len(lines) > 0


def _is_prose(text: bytes) -> bool:
    return 5 * sum(map(len, re.findall(rb"[A-Za-z\s]+", text))) >= 4 * len(text)


def _topics(source: bytes) -> list[tuple[str, bytes]]:
    """Names and texts of pydoc's help topics, from the source of its literal dict."""
    literals = (node.value for node in ast.parse(source).body if isinstance(node, ast.Assign))
    return [(name, body.encode()) for literal in literals for name, body in ast.literal_eval(literal).items()]


def _json_lines(path: Path, text: bytes) -> Iterator[Document]:
    for number, line in enumerate(text.split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise UserError(f"{path}:{number} is not JSON ({error}); each line must be one object") from error
        body = record.get("text") if isinstance(record, dict) else None
        if not isinstance(body, str) or not body.strip():
            raise UserError(f'{path}:{number} has no text; each line must be an object like {{"text": "Once upon"}}')
        label = record.get("label", "jsonl")
        if not isinstance(label, str):
            raise UserError(f'{path}:{number} has label {label!r}; a label must be a string like "prose"')
        yield Document(f"{path}:{number:09}", label, body.encode("utf-8", "surrogatepass"))
