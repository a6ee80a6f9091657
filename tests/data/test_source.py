"""Documents, near copies, the split, and each error of a wrong source."""

import json
import re
import sysconfig

import pytest

from moejax.data import source
from moejax.data.source import Document
from moejax.errors import UserError


@pytest.fixture(scope="module")
def library():
    return source.python_documents()


def test_python_source_has_three_labels_sorted_without_tests(library):
    names = [document.name for document in library]
    assert names == sorted(set(names))
    assert {document.label for document in library} == {"code", "prose", "tables"}
    folders = {part for name in names if "topics.py/" not in name for part in name.split("/")[:-1]}
    assert not folders & {"test", "tests", "idle_test", "site-packages", "dist-packages", "ensurepip", "__pycache__"}
    assert not any(name.split("/")[-1].startswith("test_") for name in names)


@pytest.mark.parametrize(
    "name, label",
    [
        ("lib/argparse.py", "code"),
        ("lib/encodings/cp437.py", "tables"),
        ("lib/html/entities.py", "tables"),
        ("lib/pydoc_data/topics.py/lambda", "prose"),
    ],
)
def test_python_labels(library, name, label):
    found = {document.name: document.label for document in library}
    if name not in found:
        pytest.skip(f"this Python comes without {name}")
    assert found[name] == label


def test_python_split_holds_out_some_of_each_label(library):
    kept, copies = source.drop_near_copies(library)
    parts = source.split(kept, 0.05)
    assert copies > 0
    if {document.name for document in library} >= {"lib/pydoc_data/topics.py/lambda"}:
        assert all(len({d.label for d in part}) == 3 for part in parts.values())


def test_python_source_on_a_stripped_interpreter(tmp_path, monkeypatch):
    """A split installation: no headers, no help topics, a broken link; then nothing at all."""
    paths = {"stdlib": str(tmp_path), "include": str(tmp_path / "absent")}
    monkeypatch.setattr(sysconfig, "get_path", paths.__getitem__)
    with pytest.raises(UserError, match="no sources under .*config.data.source=files"):
        source.python_documents()
    (tmp_path / "LICENSE.txt").symlink_to(tmp_path / "gone")
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "code.py").write_text("x = 1")
    (tmp_path / "a.py").write_text("import os\n")
    assert source.python_documents() == [Document("lib/a.py", "code", b"import os\n")]


def test_languages_are_the_same_paragraphs():
    """Six labels of twelve documents each, of one subject by their number; no sentence twice, and none of them a near copy."""
    documents = source.language_documents()
    names = ("english", "french", "german", "polish", "russian", "spanish")
    assert [(d.name, d.label) for d in documents] == [(f"{name}/{i:02}", name) for name in names for i in range(12)]
    sentences = [s for d in documents for s in re.split(r"(?<=[.?!]) ", d.text.decode())]
    assert len(sentences) == len(set(sentences)) and min(map(len, sentences)) > 20
    assert all(300 < len(d.text) < 900 and b"\n" not in d.text for d in documents)
    assert source.drop_near_copies(documents)[1] == 0
    letters = {name: {c for d in documents if d.label == name for c in d.text.decode().lower()} for name in names}
    assert letters["english"] < set("abcdefghijklmnopqrstuvwxyz ,.'-") and set("äöüß") <= letters["german"]
    assert set("абвгдеёжзийклмнопрстуфхцчшщъыьэюя") >= letters["russian"] - set(" ,.:-")


def test_near_copy_of_a_larger_document_is_removed():
    lines = [b"a line that is long enough %d" % i for i in range(10)]
    original = Document("b", "x", b"\n".join(lines))
    near = Document("a", "x", b"\n".join([*lines[:7], b"a line that is nowhere else"]))
    other = Document("c", "x", b"\n".join([*lines[:6], *(b"a line that is nowhere %d" % i for i in range(3))]))
    short = [Document("d", "x", b"one\ntwo"), Document("e", "x", b"one\ntwo"), Document("f", "x", b"one\ntwo\n3")]
    kept, removed = source.drop_near_copies([near, original, other, *short])
    assert [document.name for document in kept] == ["b", "c", "d", "f"]
    assert removed == 2


def test_split_depends_on_the_text_alone():
    documents = [Document(str(i), "x", b"text %d" % i) for i in range(200)]
    parts = source.split(documents, 0.2)
    assert 20 < len(parts["heldout"]) < 60
    assert sorted(parts["train"] + parts["heldout"], key=lambda d: int(d.name)) == documents
    renamed = source.split([Document("other", "y", d.text) for d in documents[:100]], 0.2)
    assert {d.text for d in renamed["heldout"]} <= {d.text for d in parts["heldout"]}
    assert {d.text for d in parts["heldout"]} <= {d.text for d in source.split(documents, 0.4)["heldout"]}


def test_split_errors():
    documents = [Document("a", "x", b"first"), Document("b", "x", b"second")]
    with pytest.raises(UserError, match="heldout=1.5 must lie between 0 and 1"):
        source.split(documents, 1.5)
    with pytest.raises(UserError, match="leaves heldout without any; set heldout between 0") as error:
        source.split(documents, 1e-9)
    low, high = (float(word.strip(",")) for word in str(error.value).split("between ")[1].split(" and "))
    assert len(source.split(documents, (low + high) / 2)["heldout"]) == 1
    with pytest.raises(UserError, match="leaves train without any"):
        source.split(documents, 1 - 1e-9)
    with pytest.raises(UserError, match="of 1 documents .*; add different documents"):
        source.split(documents[:1], 0.5)
    with pytest.raises(UserError, match="of 0 documents .*; add different documents"):
        source.split([], 0.5)


def test_file_documents(tmp_path):
    (tmp_path / "b.md").write_text("# B")
    (tmp_path / "NOTES").write_text("notes")
    (tmp_path / "a.jsonl").write_text('{"text": "é", "label": "story"}\n\n{"text": "two"}\n')
    documents = source.file_documents(str(tmp_path / "*"))
    assert [(d.label, d.text) for d in documents] == [
        ("plain", b"notes"), ("story", "é".encode()), ("jsonl", b"two"), ("md", b"# B")
    ]  # fmt: skip
    assert documents[2].name.endswith("a.jsonl:000000003")


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("empty.txt", "\n", "empty.txt holds no text; .*remove it"),
        ("a.jsonl", '{"text": "x"}\n{"tex": "x"}', "a.jsonl:2 has no text; each line must be"),
        ("a.jsonl", '{"text": 3}', "a.jsonl:1 has no text"),
        ("a.jsonl", '["text"]', "a.jsonl:1 has no text"),
        ("a.jsonl", '{"text": "x"}\n{"text":', "a.jsonl:2 is not JSON .*each line must be one object"),
        ("a.jsonl", json.dumps({"text": "x", "label": 1}), "a.jsonl:1 has label 1; a label must be a string"),
    ],
)
def test_file_errors(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message) as error:
        source.file_documents(str(tmp_path / "*"))
    assert "\n" not in str(error.value)


def test_no_file_and_unreadable_file(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="matches no file; give a quoted glob"):
        source.file_documents(str(tmp_path / "*.txt"))
    (tmp_path / "a.txt").write_text("x")

    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(source.Path, "read_bytes", refuse)  # root reads every file, so permissions cannot show this
    with pytest.raises(UserError, match="a.txt cannot be read: Permission denied; make it readable"):
        source.file_documents(str(tmp_path / "*.txt"))
