"""Planted specialisation is found and claimed; how tokens are sorted and counted."""

import numpy as np
import pytest
from data import tiny_tokenizer

from moejax.data import tokenizer, tokenizer_json
from moejax.report import attributes
from moejax.study import information

DRAWS = 199


def text(rng, number=24, size=(60, 200)):
    """Documents of three labels, one of them twice as frequent: the document and the row of every token, labels of documents."""
    labels = rng.permutation(np.arange(number) % 4).clip(max=2)
    of = np.repeat(np.arange(number), rng.integers(*size, number))
    return of, np.arange(len(of)) // 32, labels


def test_planted_labels_are_found():
    """Each label its own two of six experts, in the second of two layers: NMI above 0.95, claimed there and nowhere else, with a wide
    margin above the control; of shuffled studies at most one in twenty claims anything."""
    rng = np.random.default_rng(0)
    of, rows, labels = text(rng)
    experts = np.stack([rng.integers(0, 3, len(of)), labels[of]])[..., None] * 2 + np.arange(2)
    experts[1, rng.random(len(of)) < 0.005] = 0
    sizes = np.bincount(of)
    sorts = [
        information.of_documents("label", list("abc"), labels, sizes),
        information.of_tokens("position", list("abcd"), np.arange(len(of)) % 32 // 8, rows),
    ]
    found, false = information.study(sorts, experts, of, labels, 6, DRAWS)
    assert [(f.attribute, f.layer) for f in found if f.specialised] == [("label", 1)] and false <= 5
    planted = found[1]
    assert planted.nmi > 0.95 and planted.above > 0.9 and planted.low > 0.9 and planted.p <= 0.01
    assert planted.low <= planted.nmi <= planted.high <= 1 and planted.control < 0.2
    assert all(f.nmi < 0.02 and f.p > 0.05 for f in found if not f.specialised)
    assert not any(f.specialised for f in information.study(shuffled(sorts, 1), experts, of, labels, 6, DRAWS)[0])


def shuffled(sorts, seed):
    rng = np.random.default_rng(seed)
    return [own._replace(values=own.shuffle(own.values, rng)) for own in sorts]


def test_planted_classes_and_positions_are_found():
    """An expert for each class in one layer, for each half of the row in another; a label that comes with more of a class is not
    taken for it."""
    rng = np.random.default_rng(1)
    of, rows, labels = text(rng)
    place = np.arange(len(of)) % 32
    kinds = (rng.random(len(of)) < 0.3 + 0.2 * labels[of]).astype(int)
    experts = np.stack([kinds, place // 16, (rng.random(len(of)) < 0.3 + 0.2 * labels[of]).astype(int)])[..., None]
    sorts = [
        information.of_tokens("class", ["a", "b"], kinds, information.pieces(rows, of, place)),
        information.of_tokens("position", list("abcd"), place // 8, rows),
    ]
    found, _ = information.study(sorts, experts, of, labels, 2, DRAWS)
    assert [(f.attribute, f.layer) for f in found if f.specialised] == [("class", 0), ("position", 1)]
    assert found[0].nmi == pytest.approx(1) == found[4].nmi
    assert found[2].nmi > 0.005, "of class and expert in the third layer, by way of the label: in the control too"


def test_one_kind_alone_shows_nothing():
    of, _, labels = text(np.random.default_rng(2))
    same = information.of_documents("label", ["a"], np.zeros_like(labels), np.bincount(of))
    (finding,), false = information.study([same], labels[of][None, :, None], of, labels, 3, DRAWS)
    assert (finding.nmi, finding.p, finding.specialised, false) == (0, 1, False, 0)


def test_tables_by_hand():
    """Missing choices count nowhere; documents add up to the whole; counting by document first comes to the same."""
    experts = np.array([[[0, 1], [1, -1], [2, 0]], [[2, 2], [-1, -1], [0, 1]]])
    values, of = np.array([0, 1, 1]), np.array([0, 0, 1])
    table = information.tables(values, 2, experts, 3)[0]
    assert table.tolist() == [[[1, 1, 0], [1, 1, 1]], [[0, 0, 2], [1, 1, 0]]]
    assert information.tables(values, 2, experts, 3, of).sum(axis=0).tolist() == table.tolist()
    labels = np.array([1, 0])
    whole = information.of_documents("label", ["a", "b"], labels, np.bincount(of))
    by_token = information.tables(labels[of], 2, experts, 3)[0]
    assert information.counter(whole, experts, of, 3)(labels).tolist() == by_token.tolist()


def test_pieces_end_with_rows_documents_and_their_length():
    rows, of = np.repeat([0, 1], 300), np.repeat([0, 1], [350, 250])
    pieces = information.pieces(rows, of, np.tile(np.arange(300), 2))
    assert np.bincount(pieces)[1:].tolist() == [128, 128, 44, 50, 78, 128, 44]


@pytest.mark.parametrize(
    "text, name",
    [
        ("a", "lower"), (" Word", "upper"), ("7th", "digit"), ("\n  ", "space"), ("", "space"), ("'s", "punctuation"), (" ==", "operator"),
        ("é", "non-ascii"), ("�", "non-ascii"), ("\x00", "control"), ("_", "punctuation"), ("{", "operator"),
    ],
)  # fmt: skip
def test_classes(text, name):
    assert attributes.class_of(text) == name


def test_classes_of_vocabularies(tmp_path):
    """Bytes: each on its own, what starts and fills rows special. A tokenizer.json: by the text of a token."""
    names = [attributes.CLASSES[i] for i in attributes.token_classes(tokenizer.BYTES)]
    assert len(names) == 258 and names[256:] == ["special"] * 2 and set(names[128:256]) == {"non-ascii"}
    assert {chr(i) for i in range(128) if names[i] == "space"} == set(" \t\n\r\v\f\x1c\x1d\x1e\x1f")
    words = tokenizer_json.load(tiny_tokenizer.folder(tmp_path / "words"))
    found = attributes.token_classes(words)
    text = words.encode("the 7 é.")
    assert attributes.CLASSES[found[text[0]]] == "lower" and attributes.CLASSES[found[1]] == "special"
    assert [attributes.CLASSES[found[i]] for i in text if "." in words.decode([int(i)])] == ["punctuation"]


@pytest.mark.parametrize("context", [3, 8, 30, 128])
def test_bins(context):
    """As many as are named, as even as they can be."""
    bins, names = attributes.position_bins(np.arange(context), context), attributes.bin_names(context)
    edges = [name.split("-") for name in names]
    for i, (first, last) in enumerate(edges):
        assert (bins[int(first) : int(last) + 1] == i).all()
    assert int(edges[-1][1]) == context - 1 and np.ptp(np.bincount(bins)) <= 1
