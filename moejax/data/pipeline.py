"""A prepared folder -> rows -> batches. Which rows a step reads is a pure function of the seed and the step."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import grain
import numpy as np
from array_record.python.array_record_module import ArrayRecordReader

from moejax import config
from moejax.data.prepare import RECORD, load
from moejax.data.tokenizer import PAD
from moejax.errors import UserError

READ_AHEAD = grain.ReadOptions(num_threads=2, prefetch_buffer_size=8)
"""Threads that read, and batches they may be ahead."""

Arrays = dict[str, np.ndarray]
"""One row, or a batch of rows with a leading axis: the fields of `moejax.arrays.Batch`."""


class Rows:
    """Random access to the rows of one split: row i predicts the tokens i*T + 1 to i*T + T of the concatenation.

    A row is tokens i32[T], targets i32[T] (PAD past the end), segments i32[T] (documents numbered from 1, 0 past the
    end), valid bool[T] (the target lies in the same document) and labels i32[T] (0 past the end). Together the
    rows hold every target once. Raises DamagedError if the folder is not as written, UserError if it has no target.
    """

    def __init__(self, folder: Path, split: str, context: int):
        part = load(folder, split)
        self.label_names = part.label_names
        self.hash = part.hash
        self.floor = part.floor
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
        window = np.full(self._context + 1, PAD, np.int32)
        read = self._read(index * self._context, min((index + 1) * self._context + 1, self._tokens))
        window[: len(read)] = read
        # Past the end this is the number of documents, so no target there shares a document with a token.
        documents = np.searchsorted(self._offsets, positions, side="right") - 1
        here, there = documents[:-1], documents[1:]
        exists = here < len(self._labels)
        return {
            "tokens": window[:-1],
            "targets": window[1:],
            "segments": np.where(exists, here - here[0] + 1, 0).astype(np.int32),
            "valid": (here == there) & exists,
            "labels": np.where(exists, self._labels[np.where(exists, here, 0)], 0).astype(np.int32),
        }

    def blank(self) -> Arrays:
        """A row without any valid position."""
        T = self._context
        padding, zeros = np.full(T, PAD, np.int32), np.zeros(T, np.int32)
        return {"tokens": padding, "targets": padding, "segments": zeros, "valid": np.zeros(T, bool), "labels": zeros}

    def _read(self, start: int, stop: int) -> np.ndarray:
        """Tokens start to stop of the concatenation, from the records that hold them."""
        first = start // RECORD
        records = self._reader.read(list(range(first, (stop - 1) // RECORD + 1)))
        return np.frombuffer(b"".join(records), "<u2")[start - first * RECORD : stop - first * RECORD]


class Stream:
    """The training batches, endless; each epoch in another order, and a batch may span two epochs.

    Nothing is remembered between reads: to resume at a step is to read it.
    """

    def __init__(self, data: config.Data, folder: Path):
        if not 0 <= data.seed < 2**32:
            raise UserError(f"config.data.seed={data.seed} must lie between 0 and 2**32 - 1")
        if data.batch < 1:
            raise UserError(f"config.data.batch={data.batch} must be at least 1")
        self.rows = Rows(folder, "train", data.context)
        self._batch = data.batch
        self._ordered = grain.MapDataset.source(self.rows).seed(data.seed).shuffle().repeat()

    def read(self, step: int, rows: slice | None = None) -> Arrays:
        """The global batch of a step, [B, T] with row_ids i32[B], or only the given rows of it, for one host."""
        row_ids = np.arange(self._batch, dtype=np.int32)[rows or slice(None)]
        read = [self._ordered[step * self._batch + int(row)] for row in row_ids]
        return _stack(cast(list[Arrays], read), row_ids)

    def iterate(self, start_step: int, rows: slice | None = None) -> Iterator[Arrays]:
        """`read` of start_step, start_step + 1, ..., read ahead by Grain's threads."""
        steps = grain.MapDataset.range(start_step, sys.maxsize // self._batch)
        return iter(steps.map(lambda step: self.read(step, rows)).to_iter_dataset(READ_AHEAD))


def heldout_batches(rows: Rows, batch: int, limit: int | None = None) -> Iterator[Arrays]:
    """`limit` rows evenly spaced over the split (all by default) in order, in batches; blank rows fill the last one."""
    count = len(rows) if limit is None else min(limit, len(rows))
    chosen = [index * len(rows) // count for index in range(count)]
    for start in range(0, count, batch):
        real = [rows[row] for row in chosen[start : start + batch]]
        yield _stack(real + [rows.blank()] * (batch - len(real)), np.arange(batch, dtype=np.int32))


def _stack(rows: list[Arrays], row_ids: np.ndarray) -> Arrays:
    return {key: np.stack([row[key] for row in rows]) for key in rows[0]} | {"row_ids": row_ids}
