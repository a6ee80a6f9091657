"""Vocabularies: text to ids and back, at once and id by id, and how many bytes each id stands for."""

import dataclasses
import json
import sys

import numpy as np
import pytest
from data import tiny_tokenizer

from moejax import config
from moejax.data import prepare, source, tokenizer
from moejax.data.pipeline import Rows, heldout_batches
from moejax.errors import ConfigError, UserError
from moejax.train import check

TEXTS = ["the other house", " 😀 the\n\n", "e\u0301té <s> the) \n", "x)\ny 你好 the", "", " ", "\ufffd", "a\x00b"]
KINDS = ["bytes", *tiny_tokenizer.KINDS]


@pytest.fixture
def made(tmp_path):
    return lambda kind: tokenizer.of("bytes" if kind == "bytes" else tiny_tokenizer.folder(tmp_path / kind, kind))


@pytest.fixture
def folder(tmp_path):
    return tiny_tokenizer.folder(tmp_path / "tokenizer")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", TEXTS)
def test_text_comes_back_and_its_bytes_are_counted(made, kind, text):
    """What looks like a special token is text; the bytes of the ids are all of the text's, also where a normaliser shortens it."""
    tokens = made(kind)
    ids, sizes = tokens.count(text)
    assert tokens.decode(ids) == (text.replace("e\u0301", "é") if kind == "byte level" else text)
    assert sizes.sum() == len(text.encode()) and (sizes >= 0).all()
    np.testing.assert_array_equal(ids, tokens.encode(text))
    np.testing.assert_array_equal(ids, tokens.count(text.encode()).ids)
    assert not any(tokens.special(token) for token in ids)
    assert ids.max(initial=0) < tokens.vocabulary


def test_bytes_of_a_merged_token_and_of_a_character_in_pieces(made):
    """A token ends where its last character does, a space too."""
    ids, sizes = made("byte level").count("x)\ny) 你")
    assert sizes.tolist() == [1, 2, 1, 2, 3, 0, 0] and len(ids) == 7
    ids, sizes = made("fallback").count("the é😀")
    assert sizes.tolist() == [3, 1, 2, 4, 0, 0, 0]


@pytest.mark.parametrize("kind", KINDS)
def test_decoding_as_ids_come_is_decoding_at_once(made, kind):
    """Random ids, most of which are no characters, with special ones between; and what is said is never taken back."""
    tokens, rng = made(kind), np.random.default_rng(0)
    for special in (False, True):
        for _ in range(500):
            ids = rng.integers(0, tokens.vocabulary, 12).tolist()
            reader = tokenizer.Incremental(tokens, special=special)
            pieces = [reader.push(token) for token in ids]
            assert "".join(pieces) + reader.end() == tokens.decode(ids, special=special)


@pytest.mark.parametrize("kind", KINDS)
def test_a_character_appears_when_it_is_whole(made, kind):
    tokens = made(kind)
    ids = tokens.encode("a😀the end")
    reader = tokenizer.Incremental(tokens)
    pieces = [reader.push(token) for token in ids]
    assert "".join(pieces) + reader.end() == "a😀the end"
    assert not any("\ufffd" in piece for piece in pieces)
    assert len([piece for piece in pieces if piece]) > 4, "text must come before its end"


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_goes_on_from_another(made, kind):
    """The space after a prompt is said, although at the start of a text a decoder would leave it out."""
    tokens = made(kind)
    ids = tokens.encode("the other house")
    for cut in range(len(ids) + 1):
        reader = tokenizer.Incremental(tokens, [tokens.document, *ids[:cut]])
        said = "".join(reader.push(token) for token in ids[cut:]) + reader.end()
        assert tokens.decode(ids[:cut]) + said == "the other house"


def test_special_tokens_are_named_on_demand(made):
    tokens = made("fallback")
    ids = tokens.encode("<s>the</s>", special=True).tolist()
    assert ids[0] == tokens.document == 1 and ids[-1] == tokens.ends[0] == tokens.pad == 2
    assert tokens.decode(ids) == "the" and tokens.decode(ids, special=True).replace(" ", "") == "<s>the</s>"
    assert tokenizer.BYTES.encode("<s>", special=True).tolist() == [60, 115, 62]


def test_names_of_special_tokens_where_no_ids_are_given(folder):
    (folder / "generation_config.json").unlink()
    with pytest.raises(UserError, match="says neither bos nor eos.*add generation_config.json"):
        tokenizer.of(folder)
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "</s>"}, "pad_token": "<unk>"}))
    found = tokenizer.of(folder)
    assert (found.document, found.ends, found.pad) == (2, (2,), 0)
    (folder / "generation_config.json").write_text(json.dumps({"bos_token_id": 1, "eos_token_id": 999}))
    with pytest.raises(UserError, match=r"eos ids \[999\] must lie below the 304 ids"):
        tokenizer.of(folder)


def test_wrong_folders_and_texts(tmp_path, folder, monkeypatch):
    with pytest.raises(UserError, match="must be 'bytes', or a folder that holds a tokenizer.json"):
        tokenizer.of(tmp_path)
    with pytest.raises(UserError, match="not UTF-8 .*convert it or leave it out"):
        tokenizer.of(folder).count(b"caf\xe9")
    (folder / "generation_config.json").write_text("{")
    with pytest.raises(UserError, match="generation_config.json cannot be read as JSON"):
        tokenizer.of(folder)
    (folder / "generation_config.json").unlink()
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="tokenizer.json cannot be read: .*copy it again"):
        tokenizer.of(folder)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    (folder / "tokenizer.json").write_text("{ }")
    with pytest.raises(UserError, match=r"needs the tokenizers library: pip install 'moejax\[text\]'"):
        tokenizer.of(folder)


# ---- prepared text ------------------------------------------------------------------------------------------------

DOCUMENTS = [source.Document(f"{i:02}", "ab"[i % 2], f"the {i}th other é😀 text the end".encode()) for i in range(20)]


def test_rows_count_the_bytes_of_every_document(tmp_path, folder):
    """Each target's bytes are its own, and together those of the split's text; a row that is missing has none."""
    tokens = tokenizer.of(folder)
    rows = Rows(prepare.prepare(DOCUMENTS, tmp_path / "out", 0.3, tokens), "train", 16)
    part = source.split(DOCUMENTS, 0.3)["train"]
    found = [rows[i] for i in range(len(rows))]
    targets, sizes = (np.concatenate([row[name][row["valid"]] for row in found]) for name in ("targets", "bytes"))
    wanted = [tokens.count(document.text) for document in part]
    np.testing.assert_array_equal(targets, np.concatenate([ids for ids, _ in wanted]))
    np.testing.assert_array_equal(sizes, np.concatenate([size for _, size in wanted]))
    assert sizes.sum() == sum(len(document.text) for document in part)
    assert found[0]["tokens"][0] == tokens.document and found[-1]["targets"][-1] == tokens.pad
    (*_, last) = heldout_batches(rows, len(rows) - 1)
    assert last["bytes"].shape == (len(rows) - 1, 16) and not last["bytes"][1:].any()


def test_a_large_vocabulary_and_long_tokens(tmp_path, folder):
    """Ids past 65,535 and a token of 300 bytes are stored whole."""
    wide = dataclasses.replace(tokenizer.of(folder), name="wide", vocabulary=2**17, document=2**16 + 3)
    out = prepare.prepare(DOCUMENTS, tmp_path / "out", 0.3, wide)
    assert Rows(out, "train", 8)[0]["tokens"][0] == 2**16 + 3
    assert prepare.read_index(out)["splits"]["train"]["record"] == [["token", "<u4"], ["bytes", "|u1"]]

    class Long(tokenizer.Bytes):
        def count(self, text):
            return tokenizer.Counted(np.array([7], np.int32), np.array([len(text)]))

    long = Long("long", 258, 256, (), 257)
    huge = [dataclasses.replace(d, text=d.text * 10) for d in DOCUMENTS]
    row = Rows(prepare.prepare(huge, tmp_path / "long", 0.3, long), "train", 1)[0]
    assert row["bytes"].tolist() == [len(source.split(huge, 0.3)["train"][0].text)] and row["bytes"][0] > 255


def test_the_cache_and_prepared_folders_know_their_tokenizer(tmp_path, folder):
    for document in DOCUMENTS:
        (tmp_path / f"{document.name}.txt").write_bytes(document.text)
    data = config.Data(source="files", files=str(tmp_path / "*.txt"), cache=str(tmp_path / "cache"), heldout=0.3)
    mine = dataclasses.replace(data, tokenizer=str(folder))
    assert prepare.ensure(data) != prepare.ensure(mine)
    first = prepare.ensure(mine)
    taken = config.Data(source="prepared", files=str(first), tokenizer=str(folder))
    assert prepare.ensure(taken) == first
    with pytest.raises(UserError, match="was prepared with the tokenizer 'tokenizer.json .*is 'bytes'; give the one"):
        prepare.ensure(dataclasses.replace(taken, tokenizer="bytes"))
    (folder / "generation_config.json").write_text(json.dumps({"bos_token_id": 2}))
    assert prepare.ensure(mine) != first, "another start of a document"
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    with pytest.raises(UserError, match="latin.txt: the text is not UTF-8"):
        prepare.ensure(mine)
    with pytest.raises(UserError, match="planted text is read in bytes"):
        prepare.ensure(dataclasses.replace(mine, source="planted"))


def test_a_vocabulary_must_fit_the_model(folder):
    cfg = config.Config(data=config.Data(tokenizer=str(folder)))
    with pytest.raises(ConfigError, match="model.vocab_size=264 is smaller than the 304 tokens of data.tokenizer="):
        check.check(cfg)
    check.check(dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, vocab_size=304, loss_chunk=304)))
