"""The vocabulary of a published model: tokenizer.json, read by the `tokenizers` library, and the files beside it that name special ids."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from moejax.data.tokenizer import Counted, Ids, Token, Tokenizer
from moejax.errors import UserError

FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "special_tokens_map.json")
"""What belongs to a tokenizer; only the first must be there."""
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
"""A token that stands for one byte of a character that has no token. A run of them is decoded as one."""


@dataclasses.dataclass(frozen=True)
class Json(Tokenizer):
    """A vocabulary of the `tokenizers` library. The ids that a template would put around a text are left out."""

    _library: Any = dataclasses.field(repr=False, compare=False)
    _special: frozenset[int] = dataclasses.field(repr=False, compare=False)

    def count(self, text: bytes | str) -> Counted:
        body, size = _characters(text)
        found = self._encoded(body, special=False)
        if size and not found.ids:
            raise UserError(f"{self.name} gives no token for {body[:40]!r}; leave the text out")
        # How far the text has come after each id: spans may overlap within a character, and leave out what is not encoded.
        reached = np.maximum.accumulate(_byte_ends(body)[[stop for _, stop in found.offsets]])
        reached[-1:] = size
        return Counted(np.array(found.ids, np.int32), np.diff(reached, prepend=0))

    def encode(self, text: bytes | str, *, special: bool = False) -> Int[np.ndarray, " n"]:
        return np.array(self._encoded(_characters(text)[0], special).ids, np.int32)

    def decode(self, ids: Ids, *, special: bool = False) -> str:
        return self._library.decode([int(token) for token in ids], skip_special_tokens=not special)

    def special(self, token: Token) -> bool:
        return int(token) in self._special

    def unfinished(self, token: Token) -> bool:
        return bool(_BYTE.fullmatch(self._library.id_to_token(int(token)) or ""))

    def _encoded(self, body: str, special: bool) -> Any:
        self._library.encode_special_tokens = not special
        return self._library.encode(body, add_special_tokens=False)


def load(folder: Path) -> Json:
    """The tokenizer of a folder. UserError where the library is missing, the file is none, or no file says how a text begins."""
    return _load(folder, tuple(_stat(folder / name) for name in FILES))


@functools.lru_cache(maxsize=4)
def _load(folder: Path, stats: tuple[Any, ...]) -> Json:
    """The files of one state on the disk are read once."""
    try:
        import tokenizers
    except ImportError as error:
        raise UserError(f"{folder}/tokenizer.json needs the tokenizers library: pip install 'moejax[text]'") from error
    content = (folder / "tokenizer.json").read_bytes()
    try:
        library = tokenizers.Tokenizer.from_buffer(content)
    except Exception as error:  # the library has no type of its own
        raise UserError(
            f"{folder}/tokenizer.json cannot be read: {error}; copy it again from where it was published"
        ) from error
    library.no_truncation()
    library.no_padding()
    library.post_processor = None  # it adds ids around a text, and moves where tokens end
    vocabulary = max(library.get_vocab(with_added_tokens=True).values(), default=-1) + 1
    named = _named(folder, library, vocabulary)
    document = (named["bos"] or named["eos"])[0]
    pad = named["pad"][0] if named["pad"] else document
    name = f"tokenizer.json {hashlib.blake2b(content + repr(document).encode(), digest_size=8).hexdigest()}"
    special = frozenset(token for token, added in library.get_added_tokens_decoder().items() if added.special)
    return Json(name, vocabulary, document, tuple(named["eos"]), pad, library, special)


def _named(folder: Path, library: Any, vocabulary: int) -> dict[str, list[int]]:
    """Ids of bos, eos and pad: of generation_config.json, else of the names in tokenizer_config.json. Every id is in the vocabulary, and
    a text begins with bos, or where there is none with what ended the one before."""
    ids, names = _json(folder / "generation_config.json"), _json(folder / "tokenizer_config.json")

    def of(kind: str) -> list[int]:
        found = ids.get(f"{kind}_token_id")
        if found is None:
            name = names.get(f"{kind}_token")
            found = library.token_to_id(name["content"] if isinstance(name, dict) else name) if name else None
        return [] if found is None else found if isinstance(found, list) else [found]

    named = {kind: of(kind) for kind in ("bos", "eos", "pad")}
    for kind, found in named.items():
        if not all(isinstance(token, int) and 0 <= token < vocabulary for token in found):
            raise UserError(
                f"{folder}: {kind} ids {found} must lie below the {vocabulary} ids of tokenizer.json; correct the files"
            )
    if not named["bos"] and not named["eos"]:
        raise UserError(
            f"{folder} says neither bos nor eos, one of which begins a text; add generation_config.json with bos_token_id"
        )
    return named


def _json(file: Path) -> dict[str, Any]:
    try:
        tree = json.loads(file.read_text()) if file.exists() else {}
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read as JSON ({error}); copy it again, or delete it") from error
    return tree if isinstance(tree, dict) else {}


def _stat(file: Path) -> tuple[int, int] | None:
    """What tells a changed file."""
    return (file.stat().st_size, file.stat().st_mtime_ns) if file.exists() else None


def _characters(text: bytes | str) -> tuple[str, int]:
    """The text as characters, and its length in UTF-8."""
    try:
        if isinstance(text, bytes):
            return text.decode("utf-8"), len(text)
        return text, len(text.encode("utf-8"))
    except UnicodeError as error:
        raise UserError(
            f"the text is not UTF-8 ({error}), which this tokenizer reads; convert it or leave it out"
        ) from error


def _byte_ends(body: str) -> Int[np.ndarray, " n"]:
    """[characters + 1]: bytes before each character, and in all."""
    code = np.frombuffer(body.encode("utf-32-le"), "<u4")
    sizes = 1 + (code >= 0x80).astype(np.int64) + (code >= 0x800) + (code >= 0x10000)
    return np.concatenate([[0], np.cumsum(sizes)])
