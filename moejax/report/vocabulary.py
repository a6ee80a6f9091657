"""The vocabulary of a run, and how its tokens are written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from moejax.data import tokenizer
from moejax.errors import UserError


def of(config: dict[str, Any]) -> tokenizer.Tokenizer | None:
    """By the run's config; None where it is not to be found here any more."""
    try:
        return tokenizer.of(config.get("data", {}).get("tokenizer", tokenizer.NAME))
    except UserError:
        return None


def written(words: tokenizer.Tokenizer | None) -> Callable[[int], str]:
    """id -> its text; its number without a vocabulary."""
    return (lambda token: f"[{token}]") if words is None else (lambda token: words.decode([token], special=True))
