"""Token streams to shards: each shard is cut from the streams by itself, in any process, at any time."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from pydantic import ValidationError

from bd3_common.atomic import atomic_file, write_text
from data_prep.build import pool
from data_prep.format.manifest import Shard
from data_prep.format.pack import RowFormat, Rows
from data_prep.format.shards import shard_name, write_shard


class Piece(NamedTuple):
    """A stretch of the stream that one part of the input has of a split."""

    folder: Path
    begin: int  # in the part's stream
    tokens: int


@dataclass(frozen=True)
class Stream:
    """The token stream of a split: pieces one after another."""

    split: str
    pieces: tuple[Piece, ...]
    rows: RowFormat
    dtype: str

    @property
    def tokens(self) -> int:
        return sum(piece.tokens for piece in self.pieces)

    def sections(self, size: int) -> Iterator[Stream]:
        """Consecutive streams of ``size`` tokens, the last one smaller; each knows its own pieces only."""
        ends = np.cumsum([piece.tokens for piece in self.pieces]).tolist()
        for begin in range(0, self.tokens, size):
            end = min(begin + size, self.tokens)
            pieces = []
            for i in range(bisect_right(ends, begin), bisect_left(ends, end) + 1):
                piece, offset = self.pieces[i], ends[i] - self.pieces[i].tokens
                low, high = max(begin, offset), min(end, ends[i])
                if low < high:
                    pieces.append(Piece(piece.folder, piece.begin + low - offset, high - low))
            yield replace(self, pieces=tuple(pieces))

    def read(self) -> tuple[np.ndarray, np.ndarray]:
        """All tokens and the places among them where documents start."""
        tokens, starts, offset = [], [], 0
        for piece in self.pieces:
            tokens.append(self._tokens(piece))
            places = self._starts(piece)
            first, last = np.searchsorted(places, [piece.begin, piece.begin + piece.tokens])
            starts.append(places[first:last] + (offset - piece.begin))
            offset += piece.tokens
        return np.concatenate(tokens), np.concatenate(starts)

    def _tokens(self, piece: Piece) -> np.ndarray:
        dtype, path = np.dtype(self.dtype), piece.folder / f"{self.split}.tokens"
        return np.fromfile(path, dtype, piece.tokens, offset=piece.begin * dtype.itemsize)

    def _starts(self, piece: Piece) -> np.ndarray:
        # Mapped, not read: most calls want few of them.
        path = piece.folder / f"{self.split}.starts"
        return np.memmap(path, "<i8", mode="r") if path.stat().st_size else np.empty(0, np.int64)


@dataclass(frozen=True)
class ShardJob:
    """What :func:`build_shard` needs. Counts of token ids go to ``notes``, next to the shard's record."""

    stream: Stream
    number: int
    folder: Path  # of the split's shards
    notes: Path
    rows_per_member: int
    documents: bool
    vocab_size: int

    def note(self, suffix: str) -> Path:
        return self.notes / (shard_name(self.stream.split, self.number) + suffix)


def shard_jobs(stream: Stream, rows_per_shard: int, **options: Any) -> list[ShardJob]:
    """One job for each shard of a split; the tokens that fill no row are left."""
    width = stream.rows.width
    sections = enumerate(stream.sections(rows_per_shard * width))
    return [ShardJob(section, number, **options) for number, section in sections if section.tokens >= width]


def build_shard(job: ShardJob) -> Shard:
    """Write one shard and, once it is complete, its record.

    Raises:
        OSError: the disk does not take it.
    """
    counts = np.zeros(job.vocab_size, np.int64)  # of tokens at positions 1 to L-1
    shard = write_shard(job.folder, job.stream.split, job.number, _samples(job, counts))
    with atomic_file(job.note(".counts"), sync_folder=False) as temporary:
        counts.tofile(temporary)
    write_text(job.note(".json"), shard.model_dump_json())
    return shard


def finished_shard(job: ShardJob) -> Shard | None:
    """The record of a shard that is complete; None for one that has to be written."""
    with suppress(OSError, ValidationError):
        shard = Shard.model_validate_json(job.note(".json").read_bytes())
        if (job.folder / shard.name).stat().st_size == shard.bytes:
            return shard
    return None


def counts_of(jobs: Sequence[ShardJob]) -> np.ndarray:
    """Occurrences ``[V]`` of every id in the rows of finished shards, position 0 of each row left out."""
    counts = np.zeros(jobs[0].vocab_size, np.int64)
    for job in jobs:
        counts += np.fromfile(job.note(".counts"), np.int64)
    return counts


def _samples(job: ShardJob, counts: np.ndarray) -> Iterator[Rows]:
    width = job.stream.rows.width
    for section in job.stream.sections(job.rows_per_member * width):
        tokens, starts = section.read()
        whole = len(tokens) // width * width
        if not whole:
            return
        rows = job.stream.rows.cut(tokens[:whole], starts[: np.searchsorted(starts, whole)])
        if not job.documents:
            rows = rows._replace(docs=rows.docs[:0])
        counts += np.bincount(rows.tokens[:, 1:].ravel(), minlength=len(counts))
        pool.count(rows.tokens.nbytes)
        yield rows
