"""What chance would show: shuffles that keep the dependence of text, p-values over many comparisons, intervals over documents.

Tokens of a document depend on each other, so the *document* is what is drawn again and what a label is shuffled over. D documents,
n draws, C comparisons that are judged together.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from jaxtyping import Bool, Float64, Int

LEVEL = 0.05
"""Chance of claiming anything at all, in one family of comparisons, where nothing is there."""
TIE = 1e-9
"""Statistics this near are the same one, rounded."""


def shuffled_labels(
    labels: Int[np.ndarray, " D"], sizes: Int[np.ndarray, " D"], rng: np.random.Generator
) -> Int[np.ndarray, " D"]:
    """Labels of documents dealt out anew among documents of about the same size, of `size_classes`.

    The null: what a document is called has nothing to do with where its tokens go, given its length. Within such a class documents
    are exchangeable, so the test is exact (Good 2005, "Permutation, parametric and bootstrap tests of hypotheses"). Over all lengths
    at once it would not be: the few long documents of one label weigh more than what they are dealt for.
    """
    found, classes = labels.copy(), size_classes(sizes)
    for own in np.unique(classes):
        (members,) = np.nonzero(classes == own)
        found[members] = labels[rng.permutation(members)]
    return found


def size_classes(sizes: Int[np.ndarray, " D"], ratio: int = 4) -> Int[np.ndarray, " D"]:
    """A number for each document; the largest of a class has at most `ratio` times the tokens of its smallest."""
    found, smallest, number = np.zeros(len(sizes), np.int64), -1, -1
    for document in np.argsort(sizes, kind="stable"):
        if smallest < 0 or sizes[document] > ratio * smallest:
            smallest, number = sizes[document], number + 1
        found[document] = number
    return found


def rotation(lengths: Int[np.ndarray, " P"], rng: np.random.Generator) -> Int[np.ndarray, " N"]:
    """An index into tokens that lie in pieces, one after another: each piece rotated by a uniform number of places.

    Both what is rotated and what is not keep the dependence of their neighbours, which a shuffle of tokens would destroy. The null:
    within a piece the two are independent and neither has a beginning. What drifts over more than a piece is the same before and
    after, and claims nothing: rotating whole series that drift finds what is not there in up to all cases (Harris 2020, "Nonsense
    correlations in neuroscience", doi 10.1101/2020.11.29.402719). A rotation cuts a piece at one place, so pieces must be long beside
    what tokens remember: in simulations with a memory of ten tokens, a level of 5 % was 5 % in pieces of 128, 6 % of 64, 10 % of 32.
    """
    starts = np.cumsum(lengths) - lengths
    turn = np.floor(rng.random(len(lengths)) * lengths).astype(np.int64)
    start, length = np.repeat(starts, lengths), np.repeat(lengths, lengths)
    place = np.arange(lengths.sum()) - start
    return start + (place + np.repeat(turn, lengths)) % length


def p_values(observed: Float64[np.ndarray, " C"], null: Float64[np.ndarray, "n C"]) -> Float64[np.ndarray, " C"]:
    """p of every comparison, adjusted for all of them: (1 + draws whose largest statistic reaches this one) / (1 + n).

    The single-step maximum (Westfall and Young 1993, "Resampling-based multiple testing"), on statistics in standard
    deviations from the mean of their draws, the observed one among them, so that no comparison drowns the others. With
    p <= 0.05 claimed, the chance of any false claim among the C is at most 0.05.
    """
    every = np.concatenate([observed[None], null])
    spread = every.std(axis=0)
    standard = np.where(spread > TIE, (every - every.mean(axis=0)) / np.where(spread > TIE, spread, 1), 0)
    largest = standard[1:].max(axis=1)
    return (1 + (largest[:, None] >= standard[0][None] - TIE).sum(axis=0)) / (1 + len(null))


def weights(labels: Int[np.ndarray, " D"], draws: int, rng: np.random.Generator) -> Float64[np.ndarray, "n D"]:
    """How often a document counts in each draw: n - 1 of the n documents of every label, with replacement, times n / (n - 1). The labels
    are given, their texts a sample; so drawn, the spread of few is not too small (Rao and Wu 1988, JASA 83). One alone stays."""
    found = np.ones((draws, len(labels)))
    for label in np.unique(labels):
        (members,) = np.nonzero(labels == label)
        n = len(members)
        if n > 1:
            found[:, members] = rng.multinomial(n - 1, np.full(n, 1 / n), size=draws) * (n / (n - 1))
    return found


def interval(
    statistic: Callable[[Float64[np.ndarray, " D"]], Float64[np.ndarray, " C"]],
    drawn: Float64[np.ndarray, "n D"],
    within: tuple[float, float] = (-np.inf, np.inf),
) -> tuple[Float64[np.ndarray, " C"], Float64[np.ndarray, " C"]]:
    """The ends of the 95 % interval of a statistic of weighted documents, from draws of `weights`; cut at what it can be at all.

    Twice the estimate less the mean of the draws, give or take 1.96 of their standard deviations (Davison and Hinkley 1997, "Bootstrap
    methods and their application", section 5.2): a statistic that few documents make too large, as they do information, is made too
    large once more by drawing from them, and the difference takes that out.
    """
    estimate, found = statistic(np.ones(drawn.shape[1])), np.stack([statistic(w) for w in drawn])
    middle, reach = 2 * estimate - found.mean(axis=0), 1.96 * found.std(axis=0)
    return np.clip(middle - reach, *within), np.clip(middle + reach, *within)


def flipped(
    differences: Float64[np.ndarray, "D C"], counted: Bool[np.ndarray, "D C"], draws: int, seed: int
) -> Float64[np.ndarray, " C"]:
    """Paired differences of documents, tested against none: p of every comparison [C], adjusted for all.

    The null: a difference is as likely to have the other sign, for a whole document at a time (Fisher's sign test by randomisation,
    1935, "The design of experiments", section 21). The statistic is |sum| / root of the sum of squares; a comparison of n documents
    cannot pass root n, so one of few documents shows nothing.
    """
    rng = np.random.default_rng(seed)
    values = np.where(counted, differences, 0.0)
    root = np.sqrt(np.square(values).sum(axis=0))
    values = values / np.where(root > 0, root, 1)
    signs = rng.choice([-1.0, 1.0], size=(draws, len(values)))
    largest = np.abs(signs @ values).max(axis=1)
    observed = np.abs(values.sum(axis=0))
    return (1 + (largest[:, None] >= observed[None] - TIE).sum(axis=0)) / (1 + draws)
