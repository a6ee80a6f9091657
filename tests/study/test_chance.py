"""Tests of nothing claim nothing, on data as dependent as text is; and what takes the wrong unit claims a great deal."""

import numpy as np
import pytest

from moejax.study import chance, information

LAYERS, EXPERTS, KINDS = 2, 8, 3
FEW = 200 * 0.05 + 2 * (200 * 0.05 * 0.95) ** 0.5
"""Of 200, what a level of 5 % makes likely: 10, and two standard deviations."""


def documents(rng, number=40, lengths=(40, 400)):
    """The document of every token, and experts [L, N, 1]: every document has its own taste, and stays with an expert for a while."""
    sizes = rng.integers(*lengths, number)
    of = np.repeat(np.arange(number), sizes)
    taste = rng.dirichlet(np.full(EXPERTS, 0.5), size=(LAYERS, number)).cumsum(axis=-1)
    experts = (taste[:, of] < rng.random((LAYERS, len(of), 1))).sum(axis=-1).clip(max=EXPERTS - 1)
    return of, sizes, sticky(experts, rng)[..., None]


def sticky(values, rng, stay=0.8):
    """The same as before with a probability of `stay`."""
    new = rng.random(values.shape) > stay
    new[..., 0] = True
    last = np.maximum.accumulate(np.where(new, np.arange(values.shape[-1]), 0), axis=-1)
    return np.take_along_axis(values, last, axis=-1)


def p_of(attribute, experts, of, draws=39, rng=None):
    """Adjusted p of every layer, from few shuffles."""
    count = information.counter(attribute, experts, of, EXPERTS)
    null = [information.information(count(attribute.shuffle(attribute.values, rng))) for _ in range(draws)]
    return information.judged(information.information(count(attribute.values)), np.stack(null), 1).p


def test_p_values_by_hand():
    """One comparison: the rank among all. Of two, the larger statistic alone is compared with the largest of each draw."""
    null = np.arange(19.0)[:, None]
    assert chance.p_values(np.array([18.5]), null).tolist() == [1 / 20]
    assert chance.p_values(np.array([9.5]), null).tolist() == [10 / 20]
    assert chance.p_values(np.array([18.0]), null).tolist() == [2 / 20], "a tie is a draw that reaches it"
    both = chance.p_values(np.array([30.0, -1.0]), np.concatenate([null, null[::-1]], axis=1))
    assert both[0] == 1 / 20 and both[1] == 1
    assert chance.p_values(np.zeros(2), np.zeros((9, 2))).tolist() == [1, 1], "nothing varies, nothing is shown"


def test_classes_of_size():
    sizes = np.array([100, 7, 28, 29, 400, 401])
    assert chance.size_classes(sizes).tolist() == [1, 0, 0, 1, 2, 2]
    labels = np.array([0, 1, 2, 3, 4, 5])
    dealt = {tuple(chance.shuffled_labels(labels, sizes, np.random.default_rng(seed))) for seed in range(50)}
    assert len(dealt) == 8 and all({d[0], d[3]} == {0, 3} and {d[1], d[2]} == {1, 2} for d in dealt)


def test_pieces_are_rotated():
    """Each within itself, by every number of places; one of a single token stays."""
    lengths = np.array([3, 1, 4])
    turned = [chance.rotation(lengths, np.random.default_rng(seed)) for seed in range(80)]
    for index in turned:
        for start, length in ((0, 3), (3, 1), (4, 4)):
            own = index[start : start + length] - start
            assert own.tolist() == ((own[0] + np.arange(length)) % length).tolist()
    assert len({tuple(index) for index in turned}) == 12


@pytest.mark.parametrize("unequal", [False, True], ids=["any lengths", "one label long"])
def test_labels_of_nothing_are_not_claimed(unequal):
    """Of 200 sets of documents whose labels are drawn by lot; also where one label has the few long ones."""
    rng, claimed = np.random.default_rng(3), 0
    for _ in range(200):
        of, sizes, experts = documents(rng, 30, (20, 120))
        labels = np.where(sizes > 100, 0, rng.integers(1, KINDS, 30)) if unequal else rng.integers(0, KINDS, 30)
        attribute = information.of_documents("label", list("abc"), labels, sizes)
        claimed += (p_of(attribute, experts, of, rng=rng) <= chance.LEVEL).any()
    assert claimed <= FEW


def test_shuffling_tokens_would_claim_everything():
    """The same labels of nothing, shuffled token by token: the wrong unit."""
    rng, claimed = np.random.default_rng(3), 0
    for _ in range(20):
        of, _, experts = documents(rng, 30, (20, 120))
        labels = rng.integers(0, KINDS, 30)[of]
        attribute = information.Attribute("label", list("abc"), labels, lambda v, rng: rng.permutation(v), False)
        claimed += (p_of(attribute, experts, of, rng=rng) <= chance.LEVEL).any()
    assert claimed == 20


def classes(rng, tokens, drift):
    """Classes and experts that know nothing of each other; with `drift` both change slowly as well."""
    place = np.arange(tokens)
    mood = [np.sin(2 * np.pi * (place / 2560 + rng.random())) for _ in range(LAYERS + 1)]
    drawn = [(rng.random(tokens) < 0.5 + drift * own).astype(int) for own in mood]
    return sticky(drawn[0], rng), sticky(np.stack(drawn[1:]), rng)[..., None]


@pytest.mark.parametrize("drift", [0.0, 0.4])
def test_classes_of_nothing_are_not_claimed(drift):
    """Of 200 series whose neighbours are alike, whether or not they drift; a piece is long beside the five tokens they remember."""
    rng, claimed = np.random.default_rng(4), 0
    for _ in range(200):
        values, experts = classes(rng, 640, drift)
        pieces = np.arange(640) // 128
        attribute = information.of_tokens("class", ["a", "b"], values, pieces)
        claimed += (p_of(attribute, experts, np.zeros(640, int), rng=rng) <= chance.LEVEL).any()
    assert claimed <= FEW


@pytest.mark.parametrize("tokens", [False, True], ids=["pieces rotated", "tokens shuffled"])
def test_what_a_slow_mood_decides_is_in_the_control(tokens):
    """Classes and experts that follow one slow mood, and each other in nothing else: no claim, where a shuffle of tokens always makes
    one."""
    rng, claimed = np.random.default_rng(5), 0
    for _ in range(40):
        mood = 0.5 + 0.4 * np.sin(2 * np.pi * (np.arange(1200) / 1200 + rng.random()))
        values = (rng.random(1200) < mood).astype(int)
        experts = (rng.random((LAYERS, 1200)) < mood).astype(int)[..., None]
        attribute = information.of_tokens("class", ["a", "b"], values, np.arange(1200) // 32)
        if tokens:
            attribute = attribute._replace(shuffle=lambda v, rng: rng.permutation(v))
        claimed += (p_of(attribute, experts, np.zeros(1200, int), rng=rng) <= chance.LEVEL).any()
    assert claimed == 40 if tokens else claimed <= 4


@pytest.mark.parametrize(
    "taste", [[[5, 2, 2, 1], [2, 4, 2, 2], [1, 1, 3, 5]], [[3, 3, 3, 3]] * 3], ids=["some", "none"]
)
def test_intervals_cover_what_is_true(taste):
    """Of 100 samples of 42 documents, at least 85 intervals hold the information that endless documents have; plain quantiles lie above
    it, and never hold 0."""
    rng, labels, of_label = np.random.default_rng(6), np.arange(42) % 3, np.array(taste, float)
    truth = information.information((of_label / of_label.sum(axis=1, keepdims=True))[None])[0]
    covers, above = 0, 0
    for _ in range(100):
        counts = np.stack([rng.multinomial(200, rng.dirichlet(own)) for own in of_label[labels]]).astype(float)
        parts = ((np.arange(3) == labels[:, None])[..., None] * counts[:, None])[:, None]

        def statistic(weights, parts=parts):
            return information.information(np.tensordot(weights, parts, 1))

        drawn = chance.weights(labels, 99, rng)
        low, high = chance.interval(statistic, drawn, (0.0, 1.0))
        covers += low[0] <= truth <= high[0]
        above += np.quantile([statistic(w)[0] for w in drawn], 0.025) > truth
    assert covers >= 85 and above > (95 if truth == 0 else 3)


def test_documents_are_drawn_within_their_label():
    """Every label keeps its weight, and the spread of a mean is that of the usual estimate."""
    labels, values = np.array([0, 1, 1, 2, 2, 2]), np.array([9.0, 1, 3, 2, 4, 9])
    drawn = chance.weights(labels, 4000, np.random.default_rng(0))
    assert all(np.allclose(drawn[:, labels == i].sum(axis=1), (labels == i).sum()) for i in range(3))
    assert (drawn[:, 0] == 1).all()
    for i in (1, 2):
        own = values[labels == i]
        assert (drawn @ np.where(labels == i, values, 0) / len(own)).var() == pytest.approx(
            own.var(ddof=1) / len(own), rel=0.1
        )


def test_signs_of_nothing_are_not_claimed():
    """Of 200 tables of 60 comparisons; heavy tails, and documents that move all comparisons together."""
    rng, claimed = np.random.default_rng(7), 0
    for seed in range(200):
        differences = rng.standard_t(2, (30, 1)) * rng.normal(size=(30, 60))
        counted = rng.random((30, 60)) < 0.7
        claimed += (chance.flipped(differences, counted, 199, seed) <= chance.LEVEL).any()
    assert claimed <= FEW


def test_signs_of_something():
    """What all of twenty documents share is shown; what four share cannot be, and a comparison without documents is not."""
    differences, counted = np.full((20, 3), 0.1), np.ones((20, 3), bool)
    counted[4:, 1] = counted[:, 2] = False
    p = chance.flipped(differences, counted, 999, 0)
    assert p[0] == 1 / 1000 and p[1] > chance.LEVEL and p[2] == 1
