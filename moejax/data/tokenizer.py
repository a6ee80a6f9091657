"""Text -> token ids and back: bytes as they are, or the vocabulary of a tokenizer.json. One interface for both.

A document is the id that starts it and the ids of its text. There is no end token: every target within a document stands for text,
so bits per byte are nats / ln 2 / bytes of the targets.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from moejax.errors import UserError

NAME = "bytes"
DOCUMENT = 256
"""Of bytes: starts each document."""
PAD = 257
"""Of bytes: fills rows; never a valid token or target."""
VOCABULARY = 258
"""Of bytes: number of ids, 0..255 being the bytes."""
UNKNOWN = "\ufffd"
"""What a decoder writes for bytes that are no character, or not yet."""


Token = int | np.integer
Ids = Sequence[int] | Int[np.ndarray, " n"]


class Counted(NamedTuple):
    """Ids of a text, and how many of its bytes each of them adds."""

    ids: Int[np.ndarray, " n"]
    bytes: Int[np.ndarray, " n"]
    """Their sum is the length of the text. The bytes of a character that several ids make up are the first one's."""


@dataclasses.dataclass(frozen=True)
class Tokenizer(abc.ABC):
    """What data, scores and generation ask of a vocabulary."""

    name: str
    """Equal for equal tokens: `bytes`, or a hash of the content."""
    vocabulary: int
    """Number of ids."""
    document: int
    """Starts each document; stands for no text."""
    ends: tuple[int, ...]
    """Ids at which a generated text is over."""
    pad: int
    """Fills rows; never valid."""

    @abc.abstractmethod
    def count(self, text: bytes | str) -> Counted:
        """Text -> its ids without the start of a document, and their bytes. What looks like a special token is text. UserError where
        the text is not in the vocabulary's encoding."""

    @abc.abstractmethod
    def encode(self, text: bytes | str, *, special: bool = False) -> Int[np.ndarray, " n"]:
        """The ids alone; with `special` the names of special tokens become their ids, as in a chat template."""

    @abc.abstractmethod
    def decode(self, ids: Ids, *, special: bool = False) -> str:
        """The text of ids, without special tokens unless asked for; UNKNOWN for bytes that are no character."""

    @abc.abstractmethod
    def special(self, token: Token) -> bool:
        """Whether it stands for no text."""

    def unfinished(self, token: Token) -> bool:
        """Whether the id after this one may change what this one decodes to, beside a character cut in two."""
        return False


class Bytes(Tokenizer):
    """One id, one byte."""

    def count(self, text: bytes | str) -> Counted:
        ids = self.encode(text)
        return Counted(ids, np.ones_like(ids))

    def encode(self, text: bytes | str, *, special: bool = False) -> Int[np.ndarray, " n"]:
        body = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
        return np.frombuffer(body, np.uint8).astype(np.int32)

    def decode(self, ids: Ids, *, special: bool = False) -> str:
        return bytes(token for token in ids if not self.special(token)).decode("utf-8", "replace")

    def special(self, token: Token) -> bool:
        return bool(token >= DOCUMENT)


BYTES = Bytes(NAME, VOCABULARY, DOCUMENT, (), PAD)


def of(where: str | Path) -> Tokenizer:
    """`bytes`, or what the tokenizer.json of a folder describes. UserError where there is none."""
    if where == NAME:
        return BYTES
    folder = Path(where).expanduser()
    if not (folder / "tokenizer.json").is_file():
        raise UserError(f"tokenizer={str(where)!r}: must be {NAME!r}, or a folder that holds a tokenizer.json")
    from moejax.data import tokenizer_json  # what it imports is optional

    return tokenizer_json.load(folder)


class Incremental:
    """Decodes ids as they come. The pieces, joined, are the text of all ids decoded at once."""

    def __init__(self, tokenizer: Tokenizer, after: Ids = (), *, special: bool = False):
        """`after`: ids that the text goes on from, such as a prompt; what they say is not repeated."""
        self._tokenizer, self._special = tokenizer, special
        self._ids = [int(token) for token in after if special or not tokenizer.special(token)]
        self._start, self._said = 0, len(self._ids)

    def push(self, token: Token) -> str:
        """The text that this id makes certain; empty within a character."""
        if self._tokenizer.special(token) and not self._special:
            return ""
        self._ids.append(int(token))
        text = self.end()
        if not text or text.endswith(UNKNOWN) or self._tokenizer.unfinished(token):
            return ""
        # What was said last stays in sight: at its beginning a decoder may leave out a space.
        self._start, self._said = self._said, len(self._ids)
        return text

    def end(self) -> str:
        """What is left at the end of the ids."""
        decode = self._tokenizer.decode
        before = decode(self._ids[self._start : self._said], special=self._special)
        return decode(self._ids[self._start :], special=self._special)[len(before) :]
