"""Planted text: its floor is right by three independent reckonings, and travels with the prepared folder."""

import dataclasses
import itertools

import numpy as np
import pytest

from moejax import config
from moejax.data import planted, prepare, source
from moejax.errors import UserError

SMALL = config.Data(
    source="planted", planted_sources=3, planted_letters=5, planted_documents=300, context=7, heldout=0.2
)
CHAINS = planted.sources(SMALL)
VEILED = CHAINS._replace(first=np.array([planted.stationary(table) for table in CHAINS.next]))
"""The same without the letter that gives the source away."""


def probability(chains, letters):
    """p of a whole document: of every source in turn, letter by letter."""
    total = 0.0
    for first, after in zip(chains.first, chains.next, strict=True):
        p = first[letters[0]]
        for x, y in itertools.pairwise(letters):
            p *= after[x, y]
        total += p / len(chains.first)
    return total


def test_code_length_is_that_of_the_mixture():
    """All documents of four letters: their lengths are those of their probabilities, which sum to 1."""
    letters = np.array(list(itertools.product(range(5), repeat=4)))
    for chains in (CHAINS, VEILED):
        wanted = np.array([probability(chains, row) for row in letters])
        assert wanted.sum() == pytest.approx(1, abs=1e-12)
        found = planted.code_length(chains, letters[wanted > 0]).sum(axis=1)
        np.testing.assert_allclose(2**-found, wanted[wanted > 0], rtol=1e-12)


def test_long_documents_cost_the_entropy_rate():
    """Late letters cost each source's entropy rate: by then the reader knows the source."""
    of, letters = planted.sample(VEILED, 600, 1500, np.random.default_rng(0))
    late = planted.code_length(VEILED, letters)[:, 500:].mean(axis=1)
    rates = planted.entropy_rate(CHAINS)
    for s, rate in enumerate(rates):
        of_source = late[of == s]
        assert of_source.mean() == pytest.approx(rate, abs=4 * of_source.std() / len(of_source) ** 0.5)
    assert np.ptp(rates) > 0.02


def test_samples_follow_the_tables():
    """Within five standard deviations of every count."""
    of, letters = planted.sample(CHAINS, 6000, 30, np.random.default_rng(1))
    for s in range(3):
        rows = letters[of == s]
        pairs = np.zeros((5, 5))
        np.add.at(pairs, (rows[:, :-1].ravel(), rows[:, 1:].ravel()), 1)
        first = np.bincount(rows[:, 0], minlength=5)
        for count, chance in [(first, CHAINS.first[s]), *zip(pairs, CHAINS.next[s], strict=True)]:
            n = count.sum()
            assert n > 1000
            assert (abs(count - n * chance) < 5 * np.sqrt(n * chance * (1 - chance)) + 1).all()


def test_stationary():
    for table in CHAINS.next:
        pi = planted.stationary(table)
        np.testing.assert_allclose(pi @ table, pi, atol=1e-12)
        assert pi.sum() == pytest.approx(1)


def test_the_floor_is_that_of_the_heldout_documents(tmp_path):
    data = dataclasses.replace(SMALL, cache=str(tmp_path))
    folder = prepare.ensure(data)
    part = source.split(source.drop_near_copies(planted.documents(data))[0], data.heldout)["heldout"]
    letters = [[planted.LETTERS.index(byte) for byte in document.text] for document in part]
    bits = -np.log2([probability(CHAINS, row) for row in letters])
    split = prepare.load(folder, "heldout")
    assert split.floor == pytest.approx(bits.sum() / (6 * len(part)))
    assert split.label_names == ("source 0", "source 1", "source 2")
    names = [split.label_names[label] for label in split.labels]
    assert names == [document.label for document in part]
    assert prepare.ensure(data) == folder


def test_other_text_has_no_floor(tmp_path):
    documents = [source.Document(f"{i}", "a", b"the text of document %d" % i) for i in range(20)]
    assert prepare.load(prepare.prepare(documents, tmp_path / "out", 0.3), "heldout").floor is None


def test_one_seed_one_text():
    again = planted.documents(SMALL)
    assert again == planted.documents(SMALL)
    assert again != planted.documents(dataclasses.replace(SMALL, planted_seed=1))
    assert all(len(document.text) == SMALL.context - 1 for document in again)


@pytest.mark.parametrize(
    "options,said",
    [
        ({"planted_letters": 65}, "planted_letters=65 must lie between 2 and 64"),
        ({"planted_sources": 6}, "planted_sources=6: each has a first letter of its own; set 1 to planted_letters=5"),
        ({"planted_concentration": -1.0}, "planted_concentration=-1.0 must lie between 0 and 10"),
        ({"planted_documents": 1}, "planted_documents=1 must be at least 2"),
        ({"planted_seed": -1}, "planted_seed=-1 must not be below 0"),
        ({"context": 1}, "context=1 leaves a planted document no letter"),
    ],
)
def test_refusals(options, said):
    with pytest.raises(UserError, match=said):
        prepare.ensure(dataclasses.replace(SMALL, **options))
