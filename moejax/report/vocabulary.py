"""How the tokens of a run are written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from moejax.data import tokenizer
from moejax.errors import UserError


def written(config: dict[str, Any]) -> Callable[[int], str]:
    """id -> its text, by the run's vocabulary; its number where that is not to be found here any more."""
    try:
        words = tokenizer.of(config.get("data", {}).get("tokenizer", tokenizer.NAME))
    except UserError:
        return lambda token: f"[{token}]"
    return lambda token: words.decode([token], special=True)
