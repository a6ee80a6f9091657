"""A prepared folder -> rows -> batches. Which rows a step reads is a pure function of the seed and the step."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import grain
import numpy as np
from array_record.python.array_record_module import ArrayRecordReader

from moejax import config
from moejax.data.prepare import RECORD, load
from moejax.errors import ConfigError, DamagedError, UserError

DAMAGED = -1
"""Label of a position whose token or target could not be read."""
READ_AHEAD = grain.ReadOptions(num_threads=2, prefetch_buffer_size=8)
"""Threads that read, and batches they may be ahead."""

Arrays = dict[str, np.ndarray]
"""One row, or a batch of rows with a leading axis: the fields of `moejax.arrays.Batch`."""


class Rows:
    """Random access to the rows of one split: row i predicts the tokens i*T + 1 to i*T + T of the concatenation.

    A row is tokens i32[T], targets i32[T] (the pad past the end), segments i32[T] (documents numbered from 1, 0 past
    the end), valid bool[T] (the target lies in the same document) and labels i32[T] (0 past the end); where tokens are
    not bytes also bytes i32[T], those of text that the target adds. Together the rows hold every target once. Raises
    DamagedError if the folder is not as written, UserError if it has no target.

    With `allow_damaged` a record that cannot be read is padding in place, no position of it or before it is valid, and their labels are
    DAMAGED. `unreadable` are records that count as such, from 0, to rehearse it.
    """

    def __init__(
        self,
        folder: Path,
        split: str,
        context: int,
        *,
        allow_damaged: bool = False,
        unreadable: frozenset[int] = frozenset(),
    ):
        part = load(folder, split, verify=not allow_damaged)
        self._allow_damaged, self._unreadable, self._file = allow_damaged, unreadable, part.records
        self.label_names = part.label_names
        self.hash = part.hash
        self.floor = part.floor
        self._kind, self._pad = part.kind, part.pad
        self._counted = "bytes" in (part.kind.names or ())
        self._context = context
        self._offsets, self._labels = part.offsets, part.labels
        self._tokens = int(part.offsets[-1])
        if context < 1:
            raise UserError(f"config.data.context={context} must be at least 1")
        if self._tokens <= len(self._labels):
            raise UserError(f"the {split} split of {folder} holds no text; prepare it from documents that have some")
        # Without these options a read fetches megabytes ahead.
        self._reader = ArrayRecordReader(str(part.records), options="readahead_buffer_size:0,max_parallelism:0")

    def __len__(self) -> int:
        return -(-(self._tokens - 1) // self._context)

    def __getitem__(self, index: int) -> Arrays:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        positions = index * self._context + np.arange(self._context + 1)
        window = np.full(self._context + 1, self._blank_token())
        read, lost = self._read(index * self._context, min((index + 1) * self._context + 1, self._tokens))
        window[: len(read)] = read
        damaged = np.zeros(len(window), bool)
        damaged[: len(read)] = lost
        either = damaged[:-1] | damaged[1:]
        # Past the end this is the number of documents, so no target there shares a document with a token.
        documents = np.searchsorted(self._offsets, positions, side="right") - 1
        here, there = documents[:-1], documents[1:]
        exists = here < len(self._labels)
        labels = np.where(exists, self._labels[np.where(exists, here, 0)], 0)
        tokens = window["token"].astype(np.int32)
        return {
            "tokens": tokens[:-1],
            "targets": tokens[1:],
            "segments": np.where(exists & ~damaged[:-1], here - here[0] + 1, 0).astype(np.int32),
            "valid": (here == there) & exists & ~either,
            "labels": np.where(either, DAMAGED, labels).astype(np.int32),
            **({"bytes": window["bytes"][1:].astype(np.int32)} if self._counted else {}),
        }

    def blank(self) -> Arrays:
        """A row without any valid position."""
        T = self._context
        padding, zeros = np.full(T, self._pad, np.int32), np.zeros(T, np.int32)
        blank = {"tokens": padding, "targets": padding, "segments": zeros, "valid": np.zeros(T, bool), "labels": zeros}
        return blank | ({"bytes": zeros} if self._counted else {})

    def _blank_token(self) -> np.ndarray:
        """The pad, which stands for no text."""
        token = np.zeros((), self._kind)
        token["token"] = self._pad
        return token

    def _read(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens start to stop of the concatenation, from the records that hold them; and which of them could not be read."""
        first = start // RECORD
        tokens, lost = [], []
        for number, record in enumerate(self._records(list(range(first, (stop - 1) // RECORD + 1))), start=first):
            size = min(RECORD, self._tokens - number * RECORD)
            tokens.append(np.full(size, self._blank_token()) if record is None else np.frombuffer(record, self._kind))
            lost.append(np.full(size, record is None))
        part = slice(start - first * RECORD, stop - first * RECORD)
        return np.concatenate(tokens)[part], np.concatenate(lost)[part]

    def _records(self, numbers: list[int]) -> list[bytes | None]:
        """Each record, None for one that is damaged where that is allowed. Together is faster; one by one tells which it is."""
        if not self._unreadable.intersection(numbers):
            with contextlib.suppress(Exception):
                return list(self._reader.read(numbers))
        return [self._record(number) for number in numbers]

    def _record(self, number: int) -> bytes | None:
        try:
            if number in self._unreadable:
                raise OSError("config.faults.corrupt_record")
            return self._reader.read([number])[0]
        except Exception as error:  # the reader has no type of its own for damage
            if self._allow_damaged:
                return None
            raise DamagedError(
                f"record {number} of {self._file} cannot be read ({' '.join(str(error).split())[:120]}): prepare the text again, or set "
                "config.data.allow_damaged=True to go on without it"
            ) from error


NO_FAULTS = config.Faults()


class Stream:
    """The training batches, endless; each epoch in another order, and a batch may span two epochs.

    Nothing is remembered between reads: to resume at a step is to read it.
    """

    def __init__(self, data: config.Data, folder: Path, faults: config.Faults = NO_FAULTS):
        if not 0 <= data.seed < 2**32:
            raise UserError(f"config.data.seed={data.seed} must lie between 0 and 2**32 - 1")
        if data.batch < 1:
            raise UserError(f"config.data.batch={data.batch} must be at least 1")
        lost = frozenset([faults.corrupt_record - 1] if faults.corrupt_record else [])
        self.rows = Rows(folder, "train", data.context, allow_damaged=data.allow_damaged, unreadable=lost)
        self._bad_batch = faults.bad_batch - 1
        self._batch = data.batch
        require_windows(data.skip)
        self._ordered = grain.MapDataset.source(self.rows).seed(data.seed).shuffle().repeat()

    def read(self, step: int, rows: slice | None = None) -> Arrays:
        """The global batch of a step, [B, T] with row_ids i32[B], or only the given rows of it, for one host."""
        row_ids = np.arange(self._batch, dtype=np.int32)[rows or slice(None)]
        read = [self._ordered[step * self._batch + int(row)] for row in row_ids]
        batch = _stack(cast(list[Arrays], read), row_ids)
        return batch | {"targets": batch["targets"][:, ::-1]} if step == self._bad_batch else batch

    def iterate(self, start_step: int, rows: slice | None = None, skip: Windows = ()) -> Iterator[Arrays]:
        """`read` of start_step, start_step + 1, ..., read ahead by Grain's threads; batches of the windows are left out."""
        steps = grain.MapDataset.range(start_step, sys.maxsize // self._batch)
        return iter(steps.map(lambda step: self.read(position(step, skip), rows)).to_iter_dataset(READ_AHEAD))


Windows = tuple[int, ...]
"""Batches that are left out: first and one past the last, pair after pair, rising."""


def position(step: int, skip: Windows) -> int:
    """The batch that the step reads, both counted from 0."""
    for first, after in zip(skip[::2], skip[1::2], strict=True):
        step += after - first if step >= first else 0
    return step


def require_windows(skip: Windows) -> None:
    """Raises ConfigError for what are no windows."""
    if len(skip) % 2 or list(skip) != sorted(set(skip)) or any(edge < 0 for edge in skip):
        raise ConfigError(
            f"data.skip={skip}: pairs of first and one past the last batch, rising; write --config.data.skip='(100, 120)'"
        )


def heldout_batches(rows: Rows, batch: int, limit: int | None = None) -> Iterator[Arrays]:
    """`limit` rows evenly spaced over the split (all by default) in order, in batches; blank rows fill the last one."""
    count = len(rows) if limit is None else min(limit, len(rows))
    chosen = [index * len(rows) // count for index in range(count)]
    for start in range(0, count, batch):
        real = [rows[row] for row in chosen[start : start + batch]]
        yield _stack(real + [rows.blank()] * (batch - len(real)), np.arange(batch, dtype=np.int32))


def _stack(rows: list[Arrays], row_ids: np.ndarray) -> Arrays:
    return {key: np.stack([row[key] for row in rows]) for key in rows[0]} | {"row_ids": row_ids}
