"""Rows, batches and their order, on tiny documents whose concatenation is known by hand."""

import dataclasses
import itertools
import json
import subprocess
import sys

import numpy as np
import pytest

from moejax import config
from moejax.data import pipeline, prepare, source, tokenizer
from moejax.data.pipeline import Rows, Stream, heldout_batches
from moejax.errors import UserError

DATA = config.Data(context=8, batch=6, seed=3)


@pytest.fixture(scope="module")
def documents():
    lengths = np.random.default_rng(0).integers(1, 40, 60)
    texts = [b"%02d%s" % (i, b"x" * length) for i, length in enumerate(lengths)]
    return [source.Document(f"{i:02}", ("even", "odd")[i % 2], text) for i, text in enumerate(texts)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, documents):
    patch = pytest.MonkeyPatch()
    for module in (prepare, pipeline):
        patch.setattr(module, "RECORD", 16)  # so that rows lie within, across and at the ends of records
    yield prepare.prepare(documents, tmp_path_factory.mktemp("data") / "out", 0.3)
    patch.undo()


def test_tokenizer():
    ids, sizes = tokenizer.BYTES.count(b"a\xff")
    assert (ids.tolist(), sizes.tolist()) == ([97, 255], [1, 1])
    assert tokenizer.BYTES.encode(b"").tolist() == []


@pytest.mark.parametrize("split", ["train", "heldout"])
@pytest.mark.parametrize("context", [1, 7, 8, 16, 50, 5000])
def test_rows_tile_the_split(folder, documents, split, context):
    """Every field of every row against the concatenation, written out token by token."""
    part = source.split(documents, 0.3)[split]
    tokens, owners = [], []
    for number, document in enumerate(part):
        tokens += [256, *document.text]
        owners += [number] * (len(document.text) + 1)
    rows = Rows(folder, split, context)
    padding = len(rows) * context + 1 - len(tokens)
    assert 0 <= padding < context or len(rows) == 1
    tokens += [257] * padding
    owners += [None] * padding
    for i in range(len(rows)):
        row, start, stop = rows[i], i * context, (i + 1) * context
        assert row["tokens"].tolist() == tokens[start:stop]
        assert row["targets"].tolist() == tokens[start + 1 : stop + 1]
        own, following = owners[start:stop], owners[start + 1 : stop + 1]
        assert row["segments"].tolist() == [0 if o is None else o - own[0] + 1 for o in own]
        assert row["valid"].tolist() == [o is not None and o == f for o, f in zip(own, following, strict=True)]
        assert row["labels"].tolist() == [0 if o is None else part[o].label == "odd" for o in own]
        assert {key: value.dtype.name for key, value in row.items()} == {
            "tokens": "int32", "targets": "int32", "segments": "int32", "valid": "bool", "labels": "int32"
        }  # fmt: skip
    assert rows.label_names == ("even", "odd")
    with pytest.raises(IndexError):
        rows[len(rows)]


def test_valid_targets_are_the_bytes_of_the_documents(folder, documents):
    rows = Rows(folder, "train", 8)
    targets = np.concatenate([rows[i]["targets"][rows[i]["valid"]] for i in range(len(rows))])
    assert bytes(targets.tolist()) == b"".join(d.text for d in source.split(documents, 0.3)["train"])


def test_epochs_hold_every_row_once_and_differ(folder):
    stream = Stream(dataclasses.replace(DATA, batch=1), folder)
    count = len(stream.rows)
    epochs = [[stream.read(e * count + i)["tokens"].tobytes() for i in range(count)] for e in range(3)]
    expected = sorted(stream.rows[i]["tokens"].tobytes() for i in range(count))
    assert [sorted(epoch) for epoch in epochs] == [expected] * 3
    assert epochs[0] != epochs[1] != epochs[2]
    other = Stream(dataclasses.replace(DATA, batch=1, seed=4), folder)
    assert [other.read(i)["tokens"].tobytes() for i in range(count)] != epochs[0]


def test_read_is_pure_and_equals_iterate(folder):
    stream = Stream(DATA, folder)
    expected = [stream.read(step) for step in range(12)]
    np.testing.assert_equal(stream.read(2), expected[2])
    np.testing.assert_equal(list(itertools.islice(stream.iterate(0), 12)), expected)
    np.testing.assert_equal(list(itertools.islice(Stream(DATA, folder).iterate(7), 5)), expected[7:])
    assert expected[0]["tokens"].shape == (6, 8)
    assert expected[0]["row_ids"].tolist() == [0, 1, 2, 3, 4, 5]


@pytest.mark.slow
def test_read_is_equal_in_another_process(folder):
    code = (
        "import json, sys; from moejax import config; from moejax.data import pipeline; pipeline.RECORD = 16\n"
        "data = config.Data(context=8, batch=6, seed=3)\n"
        "print(json.dumps(next(pipeline.Stream(data, pipeline.Path(sys.argv[1])).iterate(40))['tokens'].tolist()))"
    )
    found = subprocess.run([sys.executable, "-c", code, folder], check=True, capture_output=True, text=True)
    assert json.loads(found.stdout) == Stream(DATA, folder).read(40)["tokens"].tolist()
    assert found.stderr == ""


def test_host_slices_make_the_global_batch(folder):
    stream = Stream(DATA, folder)
    parts = [slice(0, 2), slice(2, 3), slice(3, None)]
    for read in (stream.read, lambda step, rows=None: next(stream.iterate(step, rows))):
        hosts = [read(5, part) for part in parts]
        whole = {key: np.concatenate([host[key] for host in hosts]) for key in hosts[0]}
        np.testing.assert_equal(whole, stream.read(5))


def test_heldout_batches(folder):
    rows = Rows(folder, "heldout", 8)
    batches = list(heldout_batches(rows, 5))
    assert len(rows) % 5 and len(batches) == len(rows) // 5 + 1
    for i, batch in enumerate(batches):
        assert batch["row_ids"].tolist() == list(range(5))
        for j in range(5):
            row = {key: batch[key][j] for key in rows.blank()}
            np.testing.assert_equal(row, rows[5 * i + j] if 5 * i + j < len(rows) else rows.blank())
    assert not rows.blank()["valid"].any() and not rows.blank()["segments"].any()
    limited = list(heldout_batches(rows, 5, limit=7))
    assert len(limited) == 2
    assert limited[1]["valid"].any(axis=1).tolist() == [*batches[1]["valid"].any(axis=1)[:2], False, False, False]


def test_a_split_without_text_and_wrong_options(tmp_path, folder):
    draws = [source._uniform(text) for text in (b"", b"some")]
    texts = [source.Document("a", "x", b""), source.Document("b", "x", b"some")]
    empty = prepare.prepare(texts, tmp_path / "out", sum(draws) / 2)
    split = "heldout" if draws[0] < draws[1] else "train"
    with pytest.raises(UserError, match=f"the {split} split of .* holds no text; prepare it from documents that have"):
        Rows(empty, split, 8)
    for name, value in (("seed", -1), ("batch", 0), ("context", 0)):
        with pytest.raises(UserError, match=f"config.data.{name}={value} must"):
            Stream(dataclasses.replace(DATA, **{name: value}), folder)
