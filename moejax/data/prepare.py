"""Documents -> a prepared folder of tokens, written once and verified whenever it is opened.

    index.json              format, tokenizer, labels, counts and a hash per split
    SPLIT.npz               offsets i64[D+1], where each of the D documents starts; labels i32[D]
    SPLIT.array_record      records of RECORD tokens, the last one shorter; what a token is made of is in the index: its id, and
                            unless every token is a byte the bytes of text that it adds

for the splits train and heldout. The records are the concatenation of the encoded documents in the order of names.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter

from moejax import config
from moejax.data import planted, source, tokenizer
from moejax.data.tokenizer import BYTES, Counted, Tokenizer
from moejax.errors import DamagedError, UserError

FORMAT = 2
"""Raised by any change of the layout or of the tokens that a source gives: an old cache is not taken for a new one."""
RECORD = 8192
"""Tokens of a record: the least that a read fetches."""


@dataclasses.dataclass(frozen=True)
class Split:
    """One split of a prepared folder: what is needed to find the tokens and documents of a row."""

    records: Path
    kind: np.dtype
    """Of a token in the records: fields `token`, and `bytes` where tokens are not bytes."""
    pad: int
    """The id that fills rows."""
    offsets: np.ndarray
    """i64[D+1]: the first token of each document, and the number of tokens."""
    labels: np.ndarray
    """i32[D]: index into label_names."""
    label_names: tuple[str, ...]
    floor: float | None
    """Bits per byte that the best possible reader pays for these documents; None where that is not known."""
    hash: str
    """Of everything that a row is made from: equal on all hosts that read the same text."""


def ensure(data: config.Data) -> Path:
    """The prepared folder of any source; all but `prepared` are prepared into data.cache when first asked for.

    Raises UserError on a wrong source, on files that do not fit, and on a cache that cannot be written.
    """
    if data.source == "prepared":
        folder = Path(data.files).expanduser()
        if not (folder / "index.json").is_file():
            remedy = "make one with: python scripts/prepare.py --files=GLOB --out=DIR"
            raise UserError(f"config.data.files={data.files!r} is not a prepared folder; {remedy}")
        _require_tokenizer(folder, data)
        return folder
    if data.source not in MAKERS:
        raise UserError(f"config.data.source={data.source!r} is unknown; it must be {', '.join(MAKERS)} or prepared")
    origin, make = MAKERS[data.source]
    tokens = tokenizer.of(data.tokenizer)
    folder = Path(data.cache).expanduser() / f"{data.source}-{_key(origin(data), data.heldout, tokens)}"
    if not folder.exists():
        try:
            _write(*_parts(make(data), data.heldout), folder, tokens)
        except OSError as error:
            reason = f"config.data.cache={data.cache!r} cannot be written: {error.strerror}"
            raise UserError(f"{reason}; choose a writable folder with --config.data.cache=DIR") from error
    return folder


def prepare(documents: Iterable[source.Document], out: Path, heldout: float, tokens: Tokenizer = BYTES) -> Path:
    """Documents without near copies -> the folder `out`, which appears complete or not at all.

    `heldout` is the share of documents kept for evaluation. Raises UserError if `out` exists or cannot be written, or
    if a split would be empty.
    """
    if out.exists():
        raise UserError(f"out={str(out)!r} exists; choose another folder or delete it")
    try:
        return _write(*_parts(documents, heldout), out, tokens)
    except OSError as error:
        raise UserError(f"out={str(out)!r} cannot be written: {error.strerror}; choose another folder") from error


def whole(documents: Iterable[source.Document], out: Path, tokens: Tokenizer) -> Path:
    """Every document, near copies too, as the split heldout of a folder that has no other."""
    return _write({"heldout": sorted(documents, key=lambda document: document.name)}, 0, out, tokens)


def load(folder: Path, split: str, *, verify: bool = True) -> Split:
    """Opens a split and verifies its hash, unless told not to. Raises DamagedError if the folder is not as it was written."""
    index = read_index(folder)
    try:
        damaged = verify and index["hashes"][split] != _digest(folder, split, index)
    except (OSError, KeyError, TypeError) as error:
        raise _damaged(folder, f"cannot be read as written ({error!r})") from error
    if damaged:
        raise _damaged(folder, f"has {split} data that do not match their hash")
    with np.load(folder / f"{split}.npz") as arrays:
        offsets, labels = arrays["offsets"], arrays["labels"]
    records = folder / f"{split}.array_record"
    counts = index["splits"][split]
    kind = np.dtype([(name, code) for name, code in counts["record"]])
    floor = counts.get("ideal_bits_per_byte")
    return Split(records, kind, index["pad"], offsets, labels, tuple(index["labels"]), floor, index["hashes"][split])


def read_index(folder: Path) -> dict[str, Any]:
    """index.json: the counts of a prepared folder. Raises DamagedError, or UserError if its format is another."""
    try:
        index = json.loads((folder / "index.json").read_text())
        version = index["format"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _damaged(folder, f"has no readable index.json ({error!r})") from error
    if version != FORMAT:
        raise UserError(f"{folder} has format {version}, this code reads {FORMAT}; prepare it again")
    return index


Parts = dict[str, list[source.Document]]


def _parts(documents: Iterable[source.Document], heldout: float) -> tuple[Parts, int]:
    """The documents of each split without near copies, and the number of those."""
    kept, copies = source.drop_near_copies(documents)
    return source.split(kept, heldout), copies


def _write(parts: Parts, copies: int, out: Path, tokens: Tokenizer) -> Path:
    """Builds a temporary sibling and renames it, so that of several processes the first one wins and all succeed."""
    names = sorted({document.label for part in parts.values() for document in part})
    index = {"format": FORMAT, "tokenizer": tokens.name, "vocabulary": tokens.vocabulary, "pad": tokens.pad}
    index |= {"labels": names, "near_copies": copies, "splits": {}}
    sibling = out.with_name(f".{out.name}.{uuid.uuid4().hex}")
    try:
        sibling.mkdir(parents=True)
        for split, part in parts.items():
            index["splits"][split] = _write_split(sibling, split, part, names, tokens)
        index["hashes"] = {split: _digest(sibling, split, index) for split in parts}
        (sibling / "index.json").write_text(json.dumps(index, indent=2) + "\n")
        try:
            os.rename(sibling, out)
        except OSError:
            if not (out / "index.json").is_file():
                raise
    finally:
        shutil.rmtree(sibling, ignore_errors=True)
    return out


def _write_split(
    folder: Path, split: str, part: list[source.Document], names: list[str], tokens: Tokenizer
) -> dict[str, Any]:
    """Writes the records and arrays of a split and returns its counts."""
    encoded = [_encode(document, tokens) for document in part]
    labels = np.array([names.index(document.label) for document in part], np.int32)
    lengths = np.array([len(found.ids) for found in encoded], np.int64)
    np.savez(folder / f"{split}.npz", offsets=np.concatenate([[0], np.cumsum(lengths)]), labels=labels)
    stored = _stored(encoded, tokens)
    writer = ArrayRecordWriter(str(folder / f"{split}.array_record"), "group_size:1")
    for start in range(0, len(stored), RECORD):
        writer.write(stored[start : start + RECORD].tobytes())
    writer.close()
    per_label = {name: int(lengths[labels == i].sum()) for i, name in enumerate(names)}
    size = sum(len(document.text) for document in part)
    counts = {"documents": len(part), "tokens": len(stored), "bytes": size, "tokens_per_label": per_label}
    ideal = [document.ideal_bits for document in part if document.ideal_bits is not None]
    known = len(ideal) == len(part)
    return counts | {"record": stored.dtype.descr} | ({"ideal_bits_per_byte": sum(ideal) / size} if known else {})


def _encode(document: source.Document, tokens: Tokenizer) -> Counted:
    """The start of a document, which stands for no text, and the ids of its text."""
    try:
        ids, sizes = tokens.count(document.text)
    except UserError as error:
        raise UserError(f"{document.name}: {error}") from error
    return Counted(np.concatenate([[tokens.document], ids]), np.concatenate([[0], sizes]))


def _stored(encoded: list[Counted], tokens: Tokenizer) -> np.ndarray:
    """The tokens of all documents as they lie in the records: little-endian, in the fewest bytes that hold them."""
    ids, sizes = (np.concatenate(field) for field in zip(*encoded, strict=True))
    fields = {"token": (ids, "<u2" if tokens.vocabulary <= 2**16 else "<u4")}
    if tokens.name != BYTES.name:
        fields["bytes"] = sizes, np.min_scalar_type(sizes.max()).newbyteorder("<").str
    stored = np.empty(len(ids), [(name, code) for name, (_, code) in fields.items()])
    for name, (values, _) in fields.items():
        stored[name] = values
    return stored


def _require_tokenizer(folder: Path, data: config.Data) -> None:
    found, wanted = read_index(folder)["tokenizer"], tokenizer.of(data.tokenizer).name
    if found != wanted:
        raise UserError(
            f"{folder} was prepared with the tokenizer {found!r}, config.data.tokenizer={data.tokenizer!r} is {wanted!r}; give the one "
            "it was prepared with, or prepare it again"
        )


def _digest(folder: Path, split: str, index: dict[str, Any]) -> str:
    """Hash of the index without its hashes, and of the split's files."""
    facts = {key: value for key, value in index.items() if key != "hashes"}
    digest = hashlib.blake2b(json.dumps(facts, sort_keys=True).encode(), digest_size=16)
    for suffix in ("npz", "array_record"):
        with open(folder / f"{split}.{suffix}", "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def _key(origin: list[Any], heldout: float, tokens: Tokenizer) -> str:
    """Names a cache entry by what its content is made from."""
    return hashlib.blake2b(repr((FORMAT, heldout, tokens.name, origin)).encode(), digest_size=8).hexdigest()


def _stats(paths: list[Path]) -> list[Any]:
    """What tells a changed file."""
    try:
        return [(os.path.abspath(path), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
    except OSError as error:
        raise UserError(f"{error.filename} cannot be read: {error.strerror}; leave it out") from error


class Maker(NamedTuple):
    """A source that is prepared when asked for."""

    origin: Callable[[config.Data], list[Any]]
    """What its text is made from."""
    documents: Callable[[config.Data], list[source.Document]]


MAKERS = {
    "python": Maker(lambda data: _stats(source.python_paths()), lambda data: source.python_documents()),
    "languages": Maker(lambda data: _stats(source.language_paths()), lambda data: source.language_documents()),
    "files": Maker(lambda data: _stats(source.file_paths(data.files)), lambda data: source.file_documents(data.files)),
    "planted": Maker(planted.origin, planted.documents),
}


def _damaged(folder: Path, what: str) -> DamagedError:
    return DamagedError(f"{folder} {what}; delete the folder and prepare it again")
