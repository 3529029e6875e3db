"""Token streams to shards. Shards are independent jobs, for any process in any order."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bd3_common import schema
from bd3_common.atomic import atomic_file, write_text
from bd3_common.errors import UserError
from data_prep.build import pool
from data_prep.build.progress import Progress, Report
from data_prep.errors import DataError
from data_prep.format.manifest import Shard, Tail
from data_prep.format.pack import RowFormat, Rows
from data_prep.format.remote import RemoteFile
from data_prep.format.shards import shard_name, write_shard
from data_prep.format.upload import upload


class Segment(NamedTuple):
    """A range of tokens of one split in the stream of one input part."""

    folder: Path
    begin: int  # in the part's stream
    tokens: int


@dataclass(frozen=True)
class Stream:
    """The token stream of a split: consecutive segments."""

    split: str
    segments: tuple[Segment, ...]
    rows: RowFormat
    dtype: str

    @property
    def tokens(self) -> int:
        return sum(segment.tokens for segment in self.segments)

    def sections(self, size: int) -> Iterator[Stream]:
        """Consecutive streams of ``size`` tokens, the last one smaller; each has its own segments only."""
        ends = np.cumsum([segment.tokens for segment in self.segments]).tolist()
        for begin in range(0, self.tokens, size):
            yield self._section(begin, min(begin + size, self.tokens), ends)

    def _section(self, begin: int, end: int, ends: Sequence[int]) -> Stream:
        """Tokens ``begin`` to ``end - 1``; ``ends`` are those of the segments in the stream."""
        segments = []
        for i in range(bisect_right(ends, begin), bisect_left(ends, end) + 1):
            segment, offset = self.segments[i], ends[i] - self.segments[i].tokens
            low, high = max(begin, offset), min(end, ends[i])
            if low < high:
                segments.append(Segment(segment.folder, segment.begin + low - offset, high - low))
        return replace(self, segments=tuple(segments))

    def tail(self, documents: bool, lost: int = 0) -> Tail:
        """The tokens at the end that fill no row.

        Args:
            documents: keep where documents start.
            lost: see :class:`~data_prep.format.manifest.Tail`.
        """
        if not (rest := self.tokens % self.rows.width):
            return Tail(tokens=[], starts=[], lost=lost)
        ends = np.cumsum([segment.tokens for segment in self.segments]).tolist()
        tokens, starts = self._section(self.tokens - rest, self.tokens, ends).read()
        return Tail(tokens=tokens.tolist(), starts=starts.tolist() if documents else [], lost=lost)

    def read(self) -> tuple[np.ndarray, np.ndarray]:
        """Read all tokens ``[n]`` and the offsets of document starts ``[m]`` in them."""
        tokens, starts, offset = [], [], 0
        for segment in self.segments:
            tokens.append(self._tokens(segment))
            places = self._starts(segment)
            first, last = np.searchsorted(places, [segment.begin, segment.begin + segment.tokens])
            starts.append(places[first:last] + (offset - segment.begin))
            offset += segment.tokens
        return np.concatenate(tokens), np.concatenate(starts)

    def _tokens(self, segment: Segment) -> np.ndarray:
        dtype, path = np.dtype(self.dtype), segment.folder / f"{self.split}.tokens"
        return np.fromfile(path, dtype, segment.tokens, offset=segment.begin * dtype.itemsize)

    def _starts(self, segment: Segment) -> np.ndarray:
        # Mapped, because most calls need few of them.
        path = segment.folder / f"{self.split}.starts"
        return np.memmap(path, "<i8", mode="r") if path.stat().st_size else np.empty(0, np.int64)


@dataclass(frozen=True)
class ShardJob:
    """Arguments of :func:`build_shard`. ``notes`` takes the counts of token ids and the shard's record.

    With ``url``, the remote folder of the split, the shard is moved there.
    """

    stream: Stream
    number: int
    folder: Path  # of the split's shards
    notes: Path
    rows_per_member: int
    documents: bool
    vocab_size: int
    url: str | None = None

    @property
    def name(self) -> str:
        return shard_name(self.stream.split, self.number)

    def note(self, suffix: str) -> Path:
        return self.notes / (self.name + suffix)


def shard_jobs(stream: Stream, rows_per_shard: int, **options: Any) -> list[ShardJob]:
    """One job for each shard of a split; tokens that do not fill a row are dropped."""
    width = stream.rows.width
    sections = enumerate(stream.sections(rows_per_shard * width))
    return [ShardJob(section, number, **options) for number, section in sections if section.tokens >= width]


def build_shard(job: ShardJob) -> Shard:
    """Write one shard and, once it is complete, its record.

    Raises:
        DataError: the shard cannot be uploaded.
        OSError: the disk is full or cannot be written.
    """
    counts = np.zeros(job.vocab_size, np.int64)  # of tokens at positions 1 to L-1
    shard = write_shard(job.folder, job.stream.split, job.number, _samples(job, counts))
    with atomic_file(job.note(".counts"), sync_folder=False) as temporary:
        counts.tofile(temporary)
    if job.url is not None:
        path = job.folder / shard.name
        write_text(job.note(".stamp"), upload(path, f"{job.url}/{shard.name}"))
        path.unlink()
    write_text(job.note(".json"), shard.model_dump_json())
    return shard


def recorded_shard(job: ShardJob) -> Shard | None:
    """The record of a shard that was complete once; None if it must be written."""
    with suppress(OSError, UserError):
        return schema.read(job.note(".json"), Shard)
    return None


def is_finished(job: ShardJob, uploaded: Mapping[str, RemoteFile]) -> bool:
    """True if a shard is complete at its place.

    Args:
        uploaded: remote files by path below the data set, if shards are moved to a URL.
    """
    if (shard := recorded_shard(job)) is None:
        return False
    with suppress(OSError):
        if job.url is None:
            return (job.folder / shard.name).stat().st_size == shard.bytes
        there = uploaded.get(f"{job.stream.split}/{shard.name}")
        return there is not None and (there.bytes, there.stamp) == (shard.bytes, job.note(".stamp").read_text())
    return False


def build_shards(jobs: Sequence[ShardJob], workers: int, report: Report, uploaded: Mapping[str, RemoteFile]) -> None:
    """Write the shards that are not finished.

    Args:
        uploaded: as of :func:`is_finished`.

    Raises:
        DataError: a shard cannot be uploaded, or a worker died.
        OSError: the disk is full or cannot be written.
    """
    missing = [job for job in jobs if not is_finished(job, uploaded)]
    itemsize = np.dtype(jobs[0].stream.dtype).itemsize
    size = sum(job.stream.tokens * itemsize for job in missing)
    progress = Progress(report, "packed", size)
    for job, result in pool.run(build_shard, missing, workers, progress.tick, size):
        if isinstance(result, DataError):
            raise result
        progress.done(job.stream.tokens * itemsize, job.stream.tokens * itemsize)
    if missing:
        progress.line()


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
