"""Row reader: rows of a data set by number, from local shards or from a cache of remote shards."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack
from itertools import chain, groupby
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bd3_common.schema import MAX_BYTES, MAX_COUNT
from data_prep.errors import DataError
from data_prep.format.files import sha256_file
from data_prep.format.manifest import (
    MANIFEST,
    MEND,
    IndexedShard,
    IndexedSplit,
    Manifest,
    SplitName,
    check_files,
    load_manifest,
    parse_manifest,
    shard_path,
)
from data_prep.format.remote import fetch, is_remote, read_remote
from data_prep.read.cache import RemoteShard, ShardCache
from data_prep.read.indexed import IndexedRows, most_index_bytes, npy_file
from data_prep.read.open_files import OpenFiles, ShardFile, bytes_of


class RowReader:
    """Reads the rows of one split by number; rows are numbered shard after shard, in the manifest's order.

    Args:
        folder: a data set that bd3 prep wrote, or the URL of a copy (``s3://bucket/data``, any protocol of fsspec).
        split: train or validation.
        cache: cache of the shards of a URL.

    Raises:
        DataError: no data set there, a local shard whose size is not the manifest's, or a URL without a cache that can
            hold its largest shard.
    """

    def __init__(self, folder: str | Path, split: SplitName, cache: ShardCache | None = None):
        self.remote = is_remote(folder)
        self.folder = str(folder).rstrip("/") if self.remote else Path(folder)
        self._root = Path(folder)  # of a local data set
        self.split, self.cache = split, cache
        if self.remote and cache is None:
            raise DataError(f"{folder}: a remote data set needs a cache for its shards; give a ShardCache")
        self.manifest = _remote_manifest(str(self.folder)) if self.remote else load_manifest(folder)
        if split not in self.manifest.splits:
            raise DataError(f"{folder}: no split {split!r}; it has {', '.join(self.manifest.splits)}")
        if not self.remote:
            self._files = OpenFiles(self._path, check_files(self._root, self.manifest, (split,)), MEND)
        self.length = self.manifest.length
        self.dtype = np.dtype(self.manifest.dtype)
        self.shards = self.manifest.splits[split].shards
        largest = max((shard.bytes for shard in self.shards), default=0)
        if cache is not None and self.remote and largest > cache.limit:
            raise DataError(
                f"{folder}: its largest shard has {largest} bytes, more than the cache {cache.given} may hold "
                f"({cache.limit}); raise its limit (data.cache_gb)"
            )
        self._indexed: IndexedRows | None = None
        if isinstance(stated := self.manifest.splits[split], IndexedSplit):
            self._indexed = self._open_index(stated)
        else:
            self._index_members()

    def __len__(self) -> int:
        return self._rows

    def rows(self, indices: np.ndarray) -> np.ndarray:
        """Rows ``[n, length]`` in the stored type for row numbers ``[n]``.

        Raises:
            IndexError: a number is not in ``[0, len(self))``.
            DataError: a shard cannot be fetched, or was removed, replaced or cut since the data set was opened.
        """
        if self._indexed is not None:
            return self._indexed.rows(self._checked(indices))
        member, local = self._locate(indices)
        size = self.length * self.dtype.itemsize
        shard, offset = self._shard[member], self._tokens_offset[member] + local * size
        order = np.lexsort((offset, shard))  # each shard is read from front to back
        shard, offset = shard[order], offset[order]
        found = np.empty((len(order), self.length), self.dtype)  # [n, length] in the order of the reads
        memory = bytes_of(found)
        for number, runs in _runs(shard, offset, size):
            with self._file(number) as file:
                for begin, end, place in runs:
                    file.read_into(memory[begin * size : end * size], place)
        if (outside := found >= self.manifest.vocab_size).any():
            at = int(order[outside.any(1).argmax()])
            raise self._strange_id(int(np.asarray(indices)[at]), int(found[outside][0]))
        out = np.empty_like(found)
        out[order] = found
        return out

    def _strange_id(self, row: int, found: int) -> DataError:
        return DataError(
            f"{self.folder}: row {row} of {self.split} holds id {found}, the manifest says {self.manifest.vocab_size} "
            f"ids; {MEND}"
        )

    def documents(self, indices: np.ndarray) -> np.ndarray:
        """Document number of each position of rows ``[n]``, ``[n, length]`` int64.

        Documents are numbered through the split: one that continues in the next row has the same number there.

        Raises:
            IndexError, DataError: as :meth:`rows`.
        """
        if self._indexed is not None and self.manifest.recipe.documents:
            return self._indexed.document_numbers(self._checked(indices))
        if self._indexed is not None:
            return np.zeros((len(self._checked(indices)), self.length), np.int64)
        member, local = self._locate(indices)
        out = np.zeros((len(member), self.length), np.int64)
        for number in np.unique(member).tolist():
            starts = self._document_starts(number)
            for at in np.flatnonzero(member == number).tolist():
                low, high = np.searchsorted(starts[:, 0], (local[at], local[at] + 1))
                out[at, starts[low:high, 1]] = 1
                # The document that continues from the row before: the last one that started in an earlier row.
                out[at, 0] += self._first_document[number] + low - 1
        return out.cumsum(1)

    def prefetch(self, indices: np.ndarray) -> None:
        """Fetch the shards of these rows ``[n]`` in the background, in row order, unless the data set is local.

        A failure is raised when rows of that shard are read.
        """
        if self.remote:
            ends = np.cumsum(self.shard_rows())
            shards = dict.fromkeys(np.searchsorted(ends, self._checked(indices), side="right").tolist())
            self._shard_cache.prefetch([self._remote_shard(number) for number in shards])

    def copy_tokenizer(self, to: Path) -> None:
        """Write the data set's ``tokenizer.json`` to ``to``.

        Raises:
            DataError: it cannot be fetched, or its sha256 is not the manifest's.
            OSError: the local file cannot be read, or ``to`` cannot be written.
        """
        name = self.manifest.tokenizer
        if self.remote:
            fetch(f"{self.folder}/{name}", to, sha256=self.manifest.tokenizer_sha256, most=MAX_BYTES)
        else:
            self._check_digest(self._root / name, self.manifest.tokenizer_sha256)
            shutil.copyfile(self._root / name, to)

    @property
    def bytes(self) -> int:
        """Bytes of all shards."""
        return sum(shard.bytes for shard in self.shards)

    def verify(self, share: int = 0, shares: int = 1) -> None:
        """Compare the sha256 of the tokenizer and of the shards of the split with the manifest.

        Remote shards are fetched for that, unless they are in the cache.

        Args:
            share, shares: index and number of equal parts of the list of shards; the tokenizer belongs to part 0.

        Raises:
            DataError: names the first file that differs.
        """
        if self.remote:
            if share == 0:
                with tempfile.TemporaryDirectory() as folder:
                    self.copy_tokenizer(Path(folder) / self.manifest.tokenizer)
            for number in range(share, len(self.shards), shares):
                self._shard_cache.ensure(self._remote_shard(number))
            return
        expected = {self._root / shard_path(self.split, shard): shard.sha256 for shard in self.shards[share::shares]}
        if share == 0:
            expected[self._root / self.manifest.tokenizer] = self.manifest.tokenizer_sha256
        for path, digest in expected.items():
            self._check_digest(path, digest)

    @staticmethod
    def _check_digest(path: Path, digest: str) -> None:
        found = sha256_file(path) if path.is_file() else "missing"
        if found != digest:
            raise DataError(f"{path}: sha256 is {found[:12]}, the manifest says {digest[:12]}; {MEND}")

    @property
    def documents_started(self) -> int:
        """Number of documents that start in the rows; 0 if the data set has no document starts."""
        if self._indexed is not None:
            return self._indexed.documents if self.manifest.recipe.documents else 0
        return int(self._starts.sum())

    @property
    def unfinished(self) -> np.ndarray:
        """Numbers, int64, of documents whose last tokens may have filled no row: the last one, or none."""
        if self._indexed is not None:
            return self._indexed.unfinished if self.manifest.recipe.documents else np.array([], np.int64)
        cut = self.manifest.splits[self.split].ends_early and self.documents_started > 0
        return np.array([self.documents_started - 1] if cut else [], np.int64)

    def shard_rows(self) -> np.ndarray:
        """Rows of each shard, int64 ``[shards]``."""
        return np.array([shard.rows for shard in self.shards], np.int64)

    def _index_members(self) -> None:
        """Build the index of members, one array per column of :class:`data_prep.format.manifest.Member`."""
        counts = [len(shard.members) for shard in self.shards]
        numbers = chain.from_iterable(chain.from_iterable(shard.members for shard in self.shards))
        columns = np.fromiter(numbers, np.int64, 4 * sum(counts)).reshape(-1, 4).T
        self._tokens_offset, self._docs_offset, rows, self._starts = map(np.ascontiguousarray, columns)
        self._shard = np.repeat(np.arange(len(counts)), counts)
        sizes = np.array([shard.bytes for shard in self.shards], np.int64)[self._shard]
        # Divided, not multiplied: numbers of any size may stand in the manifest.
        bad = (rows > (sizes - self._tokens_offset) // (self.length * self.dtype.itemsize)) | (
            self._starts > (sizes - self._docs_offset) // 8
        )
        if bad.any():
            name = self.shards[self._shard[bad.argmax()]].name
            raise DataError(f"{self.folder}/{self.split}/{name}: its rows lie outside it in the manifest; {MEND}")
        if max(sum(rows.tolist()), sum(self._starts.tolist())) > MAX_COUNT:
            raise DataError(f"{self.folder}: more rows or documents than {MAX_COUNT}; {MEND}")
        self._first = np.concatenate([[0], np.cumsum(rows)])  # row with which each member begins
        self._rows = int(self._first[-1])
        self._first_document = np.cumsum(self._starts) - self._starts  # documents that start before each member

    def _open_index(self, split: IndexedSplit) -> IndexedRows:
        """The rows of token tars that :mod:`data_prep.build.index` has indexed."""
        shards = [shard for shard in split.shards if isinstance(shard, IndexedShard)]
        with ExitStack() as stack:
            path = self._root / split.index
            if self.remote:
                path = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "index.npy"
                most = most_index_bytes(shards)
                fetch(f"{self.folder}/{split.index}", path, sha256=split.index_sha256, most=most)
            else:
                self._check_digest(path, split.index_sha256)
            try:
                index = npy_file(path)
                vocab_size = self.manifest.vocab_size
                found = IndexedRows(shards, index, self.length, self.dtype, vocab_size, self._file)
            except (ValueError, TypeError) as error:
                raise DataError(f"{self.folder}/{split.index}: {error}; write it again with bd3 prep --index") from None
        self._rows = sum(shard.rows for shard in split.shards)
        return found

    def _document_starts(self, member: int) -> np.ndarray:
        """Document starts of a member, int32 ``[starts, 2]``: row within the member, and position, in that order."""
        starts = np.empty((self._starts[member], 2), "<i4")
        with self._file(int(self._shard[member])) as file:
            file.read_into(bytes_of(starts), int(self._docs_offset[member]))
            path = file.path
        rows, places = starts.T
        if (starts < 0).any() or (places >= self.length).any() or (np.diff(rows) < 0).any():
            raise DataError(f"{path}: document starts outside its rows; {MEND}")
        return starts

    def _file(self, number: int) -> AbstractContextManager[ShardFile]:
        # A cached shard is opened for one read only, because an evicted file takes disk space until it is closed.
        return self._shard_cache.opened(self._remote_shard(number)) if self.remote else self._files.file(number)

    @property
    def _shard_cache(self) -> ShardCache:
        assert self.cache is not None  # a remote data set has one
        return self.cache

    def _path(self, number: int) -> Path:
        return self._root / shard_path(self.split, self.shards[number])

    def _remote_shard(self, number: int) -> RemoteShard:
        shard = self.shards[number]
        return RemoteShard(f"{self.folder}/{shard_path(self.split, shard)}", shard.bytes, shard.sha256)

    def _locate(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(member, row within it) of each row number."""
        indices = self._checked(indices)
        member = np.searchsorted(self._first, indices, side="right") - 1
        return member, indices - self._first[member]

    def _checked(self, indices: np.ndarray) -> NDArray[np.int64]:
        """Row numbers as int64; IndexError for anything else."""
        indices = np.asarray(indices)
        if indices.ndim != 1 or not (indices.dtype.kind in "iu" or indices.size == 0):
            raise IndexError(
                f"rows of {self.folder}: need a 1-D integer array, not {indices.dtype}{list(indices.shape)}"
            )
        indices = indices.astype(np.int64)
        outside = indices[(indices < 0) | (indices >= len(self))]
        if outside.size:
            raise IndexError(
                f"row {outside[0]}: the {self.split} split of {self.folder} has rows 0 to {len(self) - 1}; "
                "take numbers from a RowOrder of its length"
            )
        return indices


def _runs(shard: np.ndarray, offset: np.ndarray, size: int) -> Iterator[tuple[int, list[tuple[int, int, int]]]]:
    """Rows that lie one after another, by shard: (shard, [(first row, row after the last, byte in the shard)]).

    Args:
        shard, offset: int ``[n]``, shard and first byte of each row, sorted by both.
        size: bytes of a row.
    """
    if len(shard) == 0:
        return
    first = np.flatnonzero(np.r_[True, (shard[1:] != shard[:-1]) | (offset[1:] != offset[:-1] + size)])
    runs = list(zip(first.tolist(), [*first[1:].tolist(), len(shard)], offset[first].tolist()))
    yield from ((number, list(of)) for number, of in groupby(runs, key=lambda run: int(shard[run[0]])))


def _remote_manifest(url: str) -> Manifest:
    where = f"{url}/{MANIFEST}"
    return parse_manifest(read_remote(where), where)
