"""Questions with given answers: which of them does a model find the likeliest?

A file has one object per line: {"prompt": "The sky is", "choices": [" blue", " salt"], "answer": 0}. Other keys are not read.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from moejax.data.tokenizer import Tokenizer
from moejax.errors import UserError
from moejax.train.scoring import Request

EXAMPLE = '{"prompt": "The sky is", "choices": [" blue", " salt"], "answer": 0}'


class Question(NamedTuple):
    """A prompt and how it may go on."""

    prompt: str
    choices: tuple[str, ...]
    answer: int
    """Index of the right choice."""


def read(path: Path) -> list[Question]:
    """The questions of a file; blank lines are skipped. UserError names the first line that is none."""
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise UserError(f"--choices={path} cannot be read: {error.strerror}") from error
    found = [_question(line, f"{path}:{number}") for number, line in enumerate(lines, start=1) if line.strip()]
    if not found:
        raise UserError(f"--choices={path} holds no question; each line must be an object like {EXAMPLE}")
    return found


def requests(questions: Sequence[Question], tokens: Tokenizer) -> list[Request]:
    """One for each choice of each question, in order. Prompt and choice are encoded as one text, as a reader meets them; scored is every
    token that reaches into the choice."""
    return [_request(question.prompt, choice, tokens) for question in questions for choice in question.choices]


def accuracy(questions: Sequence[Question], nats: Sequence[Float[np.ndarray, " _"]]) -> dict[str, float | int | None]:
    """How many answers are the likeliest of their choices, by the sum of log-probabilities (`accuracy`) and by its mean per byte of the
    choice (`accuracy_per_byte`, which does not favour short ones); the first of equals counts as chosen.

    `..._error` is the standard error of the mean over questions, None for one question; `chance` what guessing would reach.
    """
    costs = iter(float(np.sum(of_choice, dtype=np.float64)) for of_choice in nats)
    whole, per_byte = [], []
    for question in questions:
        cost = [next(costs) for _ in question.choices]
        sizes = [len(choice.encode()) for choice in question.choices]
        whole.append(int(np.argmin(cost)) == question.answer)
        per_byte.append(int(np.argmin(np.divide(cost, sizes))) == question.answer)
    numbers: dict[str, float | int | None] = {
        "questions": len(questions), "choices": len(nats), "targets": sum(map(len, nats)),
        "chance": float(np.mean([1 / len(question.choices) for question in questions])),
    }  # fmt: skip
    for name, right in (("accuracy", whole), ("accuracy_per_byte", per_byte)):
        numbers |= {name: float(np.mean(right)), f"{name}_error": _error(np.array(right))}
    return numbers


def _error(right: Bool[np.ndarray, " n"]) -> float | None:
    """Standard deviation of the questions, estimated from them, over the root of their number."""
    return float(np.std(right, ddof=1)) / math.sqrt(len(right)) if len(right) > 1 else None


def _request(prompt: str, choice: str, tokens: Tokenizer) -> Request:
    ids, sizes = tokens.count(prompt + choice)
    before = int(np.searchsorted(np.cumsum(sizes), len(prompt.encode()), side="right"))
    return Request(np.concatenate([[tokens.document], ids]).astype(np.int32), before + 1)


def _question(line: bytes, where: str) -> Question:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise UserError(f"{where} is not JSON ({error}); each line must be an object like {EXAMPLE}") from error
    record = record if isinstance(record, dict) else {}
    prompt, choices, answer = (record.get(key) for key in ("prompt", "choices", "answer"))
    if not _text(prompt):
        raise UserError(f"{where} has prompt {prompt!r}; it must be text, as in {EXAMPLE}")
    if not isinstance(choices, list) or len(choices) < 2 or not all(choice and _text(choice) for choice in choices):
        raise UserError(f"{where} has choices {choices!r}; they must be two texts or more, none empty, as in {EXAMPLE}")
    if type(answer) is not int or not 0 <= answer < len(choices):
        raise UserError(
            f"{where} has answer {answer!r}; it must be the index of a choice, from 0 to {len(choices) - 1}"
        )
    return Question(prompt, tuple(choices), answer)


def _text(value: Any) -> bool:
    """Whether it is text that can be written down: JSON allows halves of characters."""
    try:
        return isinstance(value, str) and value.encode() is not None
    except UnicodeError:
        return False
