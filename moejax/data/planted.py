"""Text of known sources, so that the least any reader can pay for it is known too.

k Markov chains share one alphabet; a document is drawn from one of them, which is its label. Source s has two random
orders of the letters, a and b, and favourites f: p_s(y | x) is proportional to exp(c cos(2 pi (a_s[y] - b_s[x]) / n) + f_s[y]).
All share the letters, so nothing but the source tells what follows, and each source's table takes a network to hold. A document
begins with its source's own letter, as with a title; from there on a reader can know the source.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from moejax import config
from moejax.data import source, tokenizer
from moejax.errors import UserError

LETTERS = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
CHUNK = 8192
"""Documents whose code length is reckoned at a time."""


class Sources(NamedTuple):
    """k Markov chains over n letters."""

    first: Float[np.ndarray, "k n"]
    """p(first letter of a document)."""
    next: Float[np.ndarray, "k n n"]
    """p(next letter | letter), letter by row."""


def sources(data: config.Data) -> Sources:
    """The chains that the options describe; the same for the same seed."""
    check(data)
    k, n = data.planted_sources, data.planted_letters
    rng = np.random.default_rng(data.planted_seed)
    # Orders and normal numbers from uniform ones alone: their stream is the one that NumPy promises to keep.
    a, b = np.argsort(rng.random((2, k, n)))
    favourites = np.sqrt(-2 * np.log(1 - rng.random((k, n)))) * np.cos(2 * np.pi * rng.random((k, n)))
    angle = 2 * np.pi / n * (a[:, None, :] - b[:, :, None])
    chances = np.exp(data.planted_concentration * np.cos(angle) + favourites[:, None, :])
    chances /= chances.sum(axis=-1, keepdims=True)
    return Sources(np.eye(k, n), chances)


def entropy_rate(chains: Sources) -> Float[np.ndarray, " k"]:
    """Bits per letter of an endless document of each source: sum_x pi_x H(p(. | x)), pi stationary (Shannon 1948, section 7)."""
    of_row = -(chains.next * np.log2(chains.next)).sum(axis=-1)
    return np.array([stationary(table) @ h for table, h in zip(chains.next, of_row, strict=True)])


def stationary(table: Float[np.ndarray, "n n"]) -> Float[np.ndarray, " n"]:
    """The distribution that a chain without zeros keeps: pi @ table = pi, sum 1."""
    n = len(table)
    equations = np.concatenate([table.T - np.eye(n), np.ones((1, n))])
    return np.linalg.lstsq(equations, np.eye(n + 1)[n], rcond=None)[0]


def code_length(chains: Sources, letters: Int[np.ndarray, "N T"]) -> Float[np.ndarray, "N T"]:
    """-log2 p(letter | earlier letters of the document): what a reader pays who knows the chains but has to find out the source,
    which counts by its posterior from a uniform prior. No model of the text pays less on average."""
    with np.errstate(divide="ignore"):  # a source that cannot have begun like this has likelihood 0
        start = np.log(chains.first[:, letters[:, :1]])
    steps = np.log(chains.next[:, letters[:, :-1], letters[:, 1:]])
    likelihood = np.cumsum(np.concatenate([start, steps], axis=2), axis=2)
    evidence = np.logaddexp.reduce(likelihood, axis=0) - np.log(len(likelihood))
    return -np.diff(evidence, axis=1, prepend=0.0) / np.log(2)


def sample(
    chains: Sources, count: int, length: int, rng: np.random.Generator
) -> tuple[Int[np.ndarray, " N"], Int[np.ndarray, "N T"]]:
    """The source of each of `count` documents, uniform, and their letters."""
    k, n = chains.first.shape
    of = (k * rng.random(count)).astype(np.int64)
    first, after = np.cumsum(chains.first, axis=-1), np.cumsum(chains.next, axis=-1)
    letters = np.empty((count, length), np.int64)
    for t in range(length):
        below = after[of, letters[:, t - 1]] if t else first[of]
        letters[:, t] = np.minimum((below <= rng.random((count, 1))).sum(axis=1), n - 1)
    return of, letters


def origin(data: config.Data) -> list[Any]:
    """All that the documents depend on."""
    check(data)
    options = [data.planted_sources, data.planted_letters, data.planted_concentration, data.planted_documents]
    return [*options, data.planted_seed, data.context]


def documents(data: config.Data) -> list[source.Document]:
    """The documents of the options, each with its source as label and its ideal code length: context - 1 letters, which fill a row
    with the token that starts a document."""
    chains = sources(data)
    rng = np.random.default_rng([data.planted_seed, 1])
    of, letters = sample(chains, data.planted_documents, data.context - 1, rng)
    bits = [code_length(chains, letters[i : i + CHUNK]).sum(axis=1) for i in range(0, len(letters), CHUNK)]
    text = np.frombuffer(LETTERS, np.uint8)[letters]
    digits, digits_of = len(str(len(of) - 1)), len(str(data.planted_sources - 1))
    return [
        source.Document(f"planted/{i:0{digits}}", f"source {s:0{digits_of}}", row.tobytes(), float(ideal))
        for i, (s, row, ideal) in enumerate(zip(of, text, np.concatenate(bits), strict=True))
    ]


def check(data: config.Data) -> None:
    """The rules of planted text."""
    n = data.planted_letters
    if not 2 <= n <= len(LETTERS):
        raise UserError(f"config.data.planted_letters={n} must lie between 2 and {len(LETTERS)}")
    if not 1 <= data.planted_sources <= n:
        remedy = f"each has a first letter of its own; set 1 to planted_letters={n}"
        raise UserError(f"config.data.planted_sources={data.planted_sources}: {remedy}")
    if not 0 <= data.planted_concentration <= 10:
        raise UserError(f"config.data.planted_concentration={data.planted_concentration} must lie between 0 and 10")
    if data.planted_documents < 2:
        raise UserError(f"config.data.planted_documents={data.planted_documents} must be at least 2")
    if data.planted_seed < 0:
        raise UserError(f"config.data.planted_seed={data.planted_seed} must not be below 0")
    if data.tokenizer != tokenizer.NAME:
        raise UserError(
            f"config.data.tokenizer={data.tokenizer!r}: planted text is read in bytes; leave it {tokenizer.NAME!r}"
        )
    if data.context < 2:
        raise UserError(f"config.data.context={data.context} leaves a planted document no letter; set at least 2")
