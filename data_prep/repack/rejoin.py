"""Rows back to the token stream of a split: the inverse of packing, a job for each shard."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from bd3_common.atomic import atomic_file, unique_suffix, write_text
from data_prep.build import pool
from data_prep.build.encode import RESULT, Encoded
from data_prep.errors import DataError
from data_prep.format.files import sha256_file
from data_prep.format.manifest import MEND, SPLITS, Member, Shard, SplitName, Tail
from data_prep.format.pack import RowFormat
from data_prep.format.remote import fetch, is_remote, line_of, open_remote

EMPTY = "empty"
"""key in ``Manifest.skipped`` of documents without a token, which a stream without BOS and EOS cannot hold"""


@dataclass(frozen=True)
class RejoinJob:
    """Arguments of :func:`rejoin`: a shard, or the tail of a split."""

    folder: Path  # for the streams
    split: SplitName
    place: str  # path or URL of the shard
    content: Shard | Tail
    made: RowFormat
    wanted: RowFormat
    dtype: str
    ids: tuple[int, int]  # ids of the vocabulary, and the mask
    opened: bool  # the token before is the BOS of a document
    ends: bool | None  # the last document ends with the last token; None: if that is EOS


class Chunk:
    """Consecutive tokens ``[n]`` of a stream, and the offsets ``[m]`` of document starts in them."""

    def __init__(self, tokens: np.ndarray, starts: np.ndarray):
        self.tokens, self.starts = tokens, starts

    @property
    def begins(self) -> bool:
        """True if a document starts at the first token."""
        return len(self.starts) > 0 and self.starts[0] == 0


def rejoin(job: RejoinJob) -> Encoded:
    """Write the tokens and document starts of a shard as a part of the split's stream in the wanted packing.

    Raises:
        DataError: the shard cannot be read, or differs from the manifest.
        OSError: the disk is full or cannot be written.
    """
    job.folder.mkdir(parents=True, exist_ok=True)
    paths = [job.folder / f"{job.split}.{kind}" for kind in ("tokens", "starts")]
    with ExitStack() as files:
        places = [files.enter_context(atomic_file(path, sync_folder=False)) for path in paths]
        tokens, starts = (files.enter_context(path.open("wb")) for path in places)
        changed = Repacking(job.made, job.wanted, job.opened, job.place)
        total = documents = empty = 0
        for chunk, ends in _with_ends(_chunks(job), job):
            chunk, dropped = changed.chunk(chunk, ends)
            tokens.write(chunk.tokens.astype(job.dtype).data)
            starts.write((chunk.starts + total).astype("<i8").data)
            total += len(chunk.tokens)
            documents += len(chunk.starts)
            empty += dropped
            pool.count(chunk.tokens.nbytes)
    none: dict[SplitName, int] = dict.fromkeys(SPLITS, 0)
    result = Encoded(
        sha256=None,
        documents=none | {job.split: documents},
        text_bytes=none,
        tokens=none | {job.split: total},
        skipped={EMPTY: empty},
        rejects=[],
        files={path.name: path.stat().st_size for path in paths},
    )
    write_text(job.folder / RESULT, result.model_dump_json())
    return result


class Repacking:
    """Replaces the BOS and EOS around documents by those of another packing, chunk after chunk of a stream.

    Args:
        opened: the token before the first chunk is the BOS of a document.
        place: name of the stream for messages.
    """

    def __init__(self, made: RowFormat, wanted: RowFormat, opened: bool, place: str):
        self.made, self.wanted, self.opened, self.place = made, wanted, opened, place
        self.same = (made.head, made.tail) == (wanted.head, wanted.tail)

    def chunk(self, chunk: Chunk, ends: bool) -> tuple[Chunk, int]:
        """The chunk in the wanted packing, and the number of documents that have no token in it.

        Args:
            ends: the last document ends with the chunk.

        Raises:
            DataError: no BOS or EOS where the packing has one.
        """
        if self.same:
            return chunk, 0
        made, wanted = self.made, self.wanted
        tokens, starts = chunk.tokens, chunk.starts
        stops = np.concatenate([starts[starts > 0], [len(tokens)] if ends and len(tokens) else []]).astype(np.int64)
        self._check(tokens[starts], made.head, "document does not begin with BOS")
        self._check(tokens[stops - 1], made.tail, "document does not end with EOS")
        keep = np.ones(len(tokens), bool)
        if made.head:
            keep[starts] = False
        if made.tail:
            keep[stops - 1] = False
        before = np.concatenate([[0], np.cumsum(keep)])  # kept tokens before each offset
        stops_new, starts_new = stops[: len(stops) * len(wanted.tail)], starts[: len(starts) * len(wanted.head)]
        at = np.concatenate([stops_new, starts_new])
        added = np.repeat(np.array([made.eos, made.bos], tokens.dtype), [len(stops_new), len(starts_new)])
        order = at.argsort(kind="stable")  # where two documents meet, EOS comes before BOS
        new = np.insert(tokens[keep], before[at[order]], added[order])
        places = before[starts] + len(wanted.tail) * np.searchsorted(stops, starts, "right")
        places += len(wanted.head) * np.arange(len(starts))
        if self.opened and not wanted.head and not chunk.begins:
            places = np.concatenate([[0], places])  # the BOS before this chunk is gone, so the document begins here
        self.opened = bool(made.head) and len(starts) > 0 and starts[-1] == len(tokens) - 1 and not ends
        lengths = np.diff(np.concatenate([places, [len(new)]]))
        empty = int((lengths == 0).sum()) - int(self.opened and not wanted.head)
        return Chunk(new, places[lengths > 0]), empty

    def _check(self, found: np.ndarray, wanted: tuple[int, ...], what: str) -> None:
        if wanted and (found != wanted[0]).any():
            raise DataError(f"{self.place}: a {what}; see bd3 check, and write the data set with bd3 prep --overwrite")


def _with_ends(chunks: Iterator[Chunk], job: RejoinJob) -> Iterator[tuple[Chunk, bool]]:
    """Each chunk, and True if a document ends with its last token."""
    chunk = next(chunks, None)
    while chunk is not None:
        following = next(chunks, None)
        if following is not None:
            ends = following.begins
        elif job.ends is None:
            ends = bool(job.made.tail) and len(chunk.tokens) > 0 and int(chunk.tokens[-1]) == job.made.eos
        else:
            ends = job.ends
        yield chunk, ends
        chunk = following


def _chunks(job: RejoinJob) -> Iterator[Chunk]:
    """The chunks of a job, one for each sample of a shard; one is in memory at a time."""
    if isinstance(job.content, Tail):
        yield _checked(job, np.array(job.content.tokens, np.int64), np.array(job.content.starts, np.int64))
        return
    fetched = job.folder / f"fetched-{unique_suffix()}"
    path = fetched if is_remote(job.place) else Path(job.place)
    try:
        if is_remote(job.place):
            fetch(job.place, fetched, job.content.bytes, job.content.sha256)
        elif (digest := _sha256(path)) != job.content.sha256:
            raise DataError(f"{path}: sha256 is {digest[:12]}, the manifest says {job.content.sha256[:12]}; {MEND}")
        with path.open("rb") as file:
            for member in map(Member._make, job.content.members):
                yield _sample(job, file, member)
    finally:
        fetched.unlink(missing_ok=True)


def _sample(job: RejoinJob, file: BinaryIO, member: Member) -> Chunk:
    made, length = job.made, job.made.length
    rows = _array(job, file, member.tokens_offset, job.dtype, member.rows * length).reshape(-1, length)  # [n, L]
    row, position = _array(job, file, member.docs_offset, "<i4", 2 * member.starts).reshape(-1, 2).astype(np.int64).T
    starts = stream_offset(row, position, made)
    return _checked(job, rows[:, made.shift : made.shift + made.width].ravel(), starts)


def _array(job: RejoinJob, file: BinaryIO, offset: int, dtype: str, count: int) -> np.ndarray:
    assert isinstance(job.content, Shard)
    if offset + count * np.dtype(dtype).itemsize > job.content.bytes:  # before memory is taken for it
        raise DataError(f"{job.place}: its rows lie outside it in the manifest; {MEND}")
    file.seek(offset)
    return np.fromfile(file, dtype, count)


def _checked(job: RejoinJob, tokens: np.ndarray, starts: np.ndarray) -> Chunk:
    size, mask = job.ids
    if len(tokens) and (int(tokens.max()) >= size or (tokens == mask).any()):
        raise DataError(f"{job.place}: an id that is the mask or not in the vocabulary; {MEND}")
    if len(starts) and (starts[0] < 0 or starts[-1] >= len(tokens) or (np.diff(starts) <= 0).any()):
        raise DataError(f"{job.place}: document starts that are no ascending places in its rows; {MEND}")
    return Chunk(tokens, starts)


def _sha256(path: Path) -> str:
    try:
        return sha256_file(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error}); {MEND}") from None


def begins_document(place: str, content: Shard | Tail, made: RowFormat) -> bool:
    """True if a document starts at the first token of a shard or tail; reads one entry of the shard."""
    if isinstance(content, Tail):
        return bool(content.starts) and content.starts[0] == 0
    members = [member for member in map(Member._make, content.members) if member.rows]
    return bool(members) and members[0].starts > 0 and _start_at(place, members[0].docs_offset, made) == 0


def opens_document(place: str, content: Shard | Tail, made: RowFormat) -> bool:
    """True if the last token of a shard is the BOS of a document; reads one entry of the shard."""
    members = [] if isinstance(content, Tail) else [m for m in map(Member._make, content.members) if m.rows]
    if not made.head or not members or not members[-1].starts:
        return False
    _, offset, rows, starts = members[-1]
    return _start_at(place, offset + 8 * (starts - 1), made) == rows * made.width - 1


def _start_at(place: str, offset: int, made: RowFormat) -> int:
    """The document start that is stored at ``offset`` of a shard, as an offset in the stream of its sample."""
    try:
        with open_remote(place) if is_remote(place) else open(place, "rb") as file:
            file.seek(offset)
            entry = np.frombuffer(file.read(8), "<i4")
    except DataError:
        raise
    except Exception as error:  # each protocol has its own exceptions
        raise DataError(f"{place}: cannot be read ({line_of(error)}); {MEND}") from None
    if len(entry) != 2:
        raise DataError(f"{place}: its document starts lie outside it in the manifest; {MEND}")
    row, position = entry.tolist()
    return int(stream_offset(row, position, made))


def stream_offset(row: Any, position: Any, made: RowFormat) -> Any:
    """Offsets in the stream of places in rows."""
    # A document that begins right after the wrapping BOS begins with it, at position 0.
    return row * made.width + np.maximum(position - made.shift, 0)
