"""The prepared folder: complete or absent, verified on opening, made once; and the script that makes it."""

import concurrent.futures
import dataclasses
import importlib.util
import json
import os
from pathlib import Path

import pytest

from moejax import config
from moejax.data import prepare, source
from moejax.errors import DamagedError, UserError

DOCUMENTS = [source.Document(f"{i:02}", "ab"[i % 2], b"the text of document %d" % i) for i in range(20)]
SCRIPT = Path(__file__).parents[2] / "scripts" / "prepare.py"


@pytest.fixture
def folder(tmp_path):
    return prepare.prepare(DOCUMENTS, tmp_path / "out", 0.3)


@pytest.fixture
def texts(tmp_path):
    """Twenty text files, and the options that read them."""
    for document in DOCUMENTS:
        (tmp_path / f"{document.name}.txt").write_bytes(document.text)
    return config.Data(source="files", files=str(tmp_path / "*.txt"), cache=str(tmp_path / "cache"), heldout=0.3)


@pytest.fixture
def script():
    spec = importlib.util.spec_from_file_location("prepare_script", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_counts(folder, tmp_path):
    index = prepare.read_index(folder)
    parts = source.split(DOCUMENTS, 0.3)
    for split, part in parts.items():
        tokens = {label: sum(len(d.text) + 1 for d in part if d.label == label) for label in "ab"}
        counts = {"documents": len(part), "tokens": sum(tokens.values()), "tokens_per_label": tokens}
        counts |= {"bytes": sum(len(d.text) for d in part), "record": [["token", "<u2"]]}
        assert index["splits"][split] == counts
        assert prepare.load(folder, split).offsets[-1] == counts["tokens"]
    assert (index["near_copies"], index["vocabulary"], index["labels"]) == (0, 258, ["a", "b"])
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_same_documents_give_the_same_hash(folder, tmp_path):
    again = prepare.prepare(reversed(DOCUMENTS), tmp_path / "again", 0.3)
    assert prepare.read_index(again) == prepare.read_index(folder)


def test_near_copies_are_counted_before_the_split(tmp_path):
    copies = [dataclasses.replace(document, name=f"copy{document.name}") for document in DOCUMENTS]
    assert prepare.read_index(prepare.prepare(DOCUMENTS + copies, tmp_path / "out", 0.3))["near_copies"] == 20


@pytest.mark.parametrize("name", ["train.array_record", "train.npz", "index.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_damage_is_detected(folder, name, damage):
    path = folder / name
    content = path.read_bytes()
    if damage == "remove":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif name == "index.json":
        path.write_bytes(content.replace(b'"b"', b'"c"'))
    else:
        path.write_bytes(content[:100] + bytes([content[100] ^ 1]) + content[101:])
    with pytest.raises(DamagedError, match=f"{folder} .*; delete the folder and prepare it again"):
        prepare.load(folder, "train")


def test_another_format_is_no_damage(folder):
    index = prepare.read_index(folder) | {"format": 0}
    (folder / "index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="has format 0, this code reads 2; prepare it again"):
        prepare.load(folder, "train")


def test_failed_prepare_leaves_nothing(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(prepare, "_write_split", fail)
    with pytest.raises(UserError, match="cannot be written: No space left on device; choose another folder"):
        prepare.prepare(DOCUMENTS, tmp_path / "out", 0.3)
    assert not list(tmp_path.iterdir())


def test_ensure_prepares_once_and_follows_changes(texts):
    folder = prepare.ensure(texts)
    modified = (folder / "index.json").stat().st_mtime_ns
    assert prepare.ensure(texts) == folder
    assert (folder / "index.json").stat().st_mtime_ns == modified
    assert prepare.ensure(dataclasses.replace(texts, heldout=0.4)) != folder
    os.utime(texts.files.replace("*", "03"), ns=(1, 1))
    assert prepare.ensure(texts) != folder


def test_two_at_once_both_succeed(texts):
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        folders = set(pool.map(prepare.ensure, [texts] * 4))
    assert len(folders) == 1
    assert list(Path(texts.cache).iterdir()) == list(folders)
    prepare.load(folders.pop(), "train")


def test_ensure_takes_a_prepared_folder(folder):
    assert prepare.ensure(config.Data(source="prepared", files=str(folder))) == folder


def test_ensure_errors(texts, tmp_path):
    with pytest.raises(UserError, match="'nowhere' is not a prepared folder; make one with: python scripts/prepare.py"):
        prepare.ensure(config.Data(source="prepared", files="nowhere"))
    with pytest.raises(
        UserError, match="config.data.source='web' is unknown; it must be python, languages, files, planted or prepared"
    ):
        prepare.ensure(config.Data(source="web"))
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="cannot be written: Not a directory; .*--config.data.cache=DIR"):
        prepare.ensure(dataclasses.replace(texts, cache=str(tmp_path / "file")))


def test_script_prints_the_same_numbers_as_table_and_json(script, texts, tmp_path, capsys):
    script.main([f"--files={texts.files}", f"--out={tmp_path / 'one'}", "--heldout=0.3", "--json"])
    counts = json.loads(capsys.readouterr().out)
    script.main([f"--files={texts.files}", f"--out={tmp_path / 'two'}", "--heldout=0.3"])
    header, *rows, copies = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert header == ["split", "documents", "bytes", "tokens", "txt"]
    for name, documents, size, tokens, txt in rows:
        split = counts["splits"][name]
        assert (int(documents), int(tokens), int(txt)) == (split["documents"], split["tokens"], split["tokens"])
        assert int(size) == split["bytes"] == split["tokens"] - split["documents"]
    assert copies[-1] == str(counts["near_copies"]) == "0"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--out=x"], "one of the arguments --files --python is required"),
        (["--python"], "--out"),
        (["--files=nothing*", "--out=x"], "matches no file"),
        (["--files={files}", "--out={out}"], "exists; choose another folder"),
        (["--files={files}", "--out=x", "--heldout=2"], "must lie between 0 and 1"),
    ],
)
def test_script_errors_are_one_line(script, texts, tmp_path, capsys, arguments, message):
    with pytest.raises(SystemExit) as stop:
        script.main([argument.format(files=texts.files, out=tmp_path) for argument in arguments])
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert message in error and error.count("\n") == 1


def test_languages_are_a_source(tmp_path):
    """Every language is trained on, and some of the text held out, at the default share too."""
    for heldout in (0.05, 0.25):
        folder = prepare.ensure(config.Data(source="languages", cache=str(tmp_path), heldout=heldout))
        index = prepare.read_index(folder)
        assert len(index["labels"]) == 6 and index["near_copies"] == 0
        assert (
            all(index["splits"]["train"]["tokens_per_label"].values()) and index["splits"]["heldout"]["documents"] > 0
        )
