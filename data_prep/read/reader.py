"""Reading rows by number from memory-mapped shards, here or in a cache of shards that lie elsewhere."""

from __future__ import annotations

import shutil
import tempfile
import threading
from collections.abc import Iterator
from functools import lru_cache
from itertools import chain
from pathlib import Path

import numpy as np

from data_prep.errors import DataError
from data_prep.format.files import sha256_file
from data_prep.format.manifest import (
    MANIFEST,
    MEND,
    Manifest,
    SplitName,
    check_files,
    load_manifest,
    parse_manifest,
)
from data_prep.format.remote import fetch, is_remote
from data_prep.read.cache import RemoteShard, ShardCache
from data_prep.read.mapping import Stretch, map_file

MAPS_KEPT = 256  # where shards are mapped one by one: each such map holds a descriptor, and 1024 are common
_INT64, _UINT64 = np.dtype(np.int64), np.dtype(np.uint64)
_UNMAPPED = -(2**62)  # far below 0 with any row's offset added


class RowReader:
    """Serves the rows of one split by global number: shard after shard in the manifest's order.

    Args:
        folder: what bd3 prep wrote, or the URL of a copy of it (``s3://bucket/data``, any protocol of fsspec).
        split: train or validation.
        cache: where the shards of a URL are kept.

    Raises:
        DataError: no data set there, a local shard whose size is not the manifest's, or a URL without a cache that can
            hold its largest shard.
    """

    def __init__(self, folder: str | Path, split: SplitName, cache: ShardCache | None = None):
        self.remote = is_remote(folder)
        self.folder = str(folder).rstrip("/") if self.remote else Path(folder)
        self.split, self.cache = split, cache
        if self.remote and cache is None:
            raise DataError(f"{folder}: a data set elsewhere needs a cache for its shards; give a ShardCache")
        self.manifest = _remote_manifest(self.folder) if self.remote else load_manifest(folder)
        if split not in self.manifest.splits:
            raise DataError(f"{folder}: no split {split!r}; it has {', '.join(self.manifest.splits)}")
        if not self.remote:
            check_files(self.folder, self.manifest, (split,))
        self.length = self.manifest.length
        self.dtype = np.dtype(self.manifest.dtype)
        self.shards = self.manifest.splits[split].shards
        largest = max((shard.bytes for shard in self.shards), default=0)
        if self.remote and largest > cache.limit:
            raise DataError(
                f"{folder}: its largest shard has {largest} bytes, more than the cache {cache.folder} may hold "
                f"({cache.limit}); raise its limit (data.cache_gb)"
            )
        self._lock = threading.Lock()
        self._map = lru_cache(MAPS_KEPT)(self._map_file)
        self._index_members()
        self._stretch = None if self.remote else self._reserve()
        self._is_uniform = self._stretch is not None and self._rows_per_member > 1

    def __len__(self) -> int:
        return int(self._first[-1])

    def rows(self, indices: np.ndarray) -> np.ndarray:
        """Rows ``[n, length]`` in the stored type for row numbers ``[n]``.

        Raises:
            IndexError: a number is not in ``[0, len(self))``.
            DataError: a shard cannot be fetched, or is gone or cut since the data set was opened.
        """
        if self._is_uniform and type(indices) is np.ndarray and indices.dtype == _INT64 and indices.ndim == 1:
            with self._lock:  # another thread might unmap
                try:
                    # As uint64, a number below 0 lies far outside, also after the division by 2 or more.
                    member = (indices.view(_UINT64) // self._rows_per_member).view(_INT64)
                    start = self._table.take(member)
                    start += indices * self._step
                    found = self._pick(start)
                    return found.view(self.dtype).reshape(-1, self.length)
                except IndexError:  # a number outside, or one whose shard is not mapped yet
                    pass
        member, local = self._locate(indices)
        out = np.empty((len(member), self.length), self.dtype)
        for here, raw, begin in self._parts(self._shard[member]):
            chosen = member[here]
            start = begin + self._tokens_offset[chosen] + local[here] * (self.length * self.dtype.itemsize)
            windows = np.lib.stride_tricks.sliding_window_view(raw.view(self.dtype), self.length)
            out[here] = windows[start // self.dtype.itemsize]
        return out

    def documents(self, indices: np.ndarray) -> np.ndarray:
        """Which document each position of rows ``[n]`` belongs to, ``[n, length]`` int64.

        Documents are counted through the split, so that one that goes on in the next row has the same number there.

        Raises:
            IndexError, DataError: as :meth:`rows`.
        """
        member, local = self._locate(indices)
        out = np.zeros((len(member), self.length), np.int64)
        for here, raw, begin in self._parts(self._shard[member]):
            chosen = member[here]
            starts = raw.view("<i4")  # pairs (row in member, position), by row
            pairs = (begin + self._docs_offset[chosen]) // 4
            count = self._starts[chosen]
            low = _bisect(starts, pairs, count, local[here])
            high = _bisect(starts, pairs, count, local[here] + 1)
            found = np.zeros((len(chosen), self.length), np.int64)
            row = np.repeat(np.arange(len(chosen)), high - low)
            number = np.arange(len(row)) - np.repeat(np.cumsum(high - low) - high, high - low)
            found[row, starts[pairs[row] + 2 * number + 1]] = 1
            found[:, 0] += self._first_document[chosen] + low - 1  # the document that the rows before end with
            out[here] = found
        return out.cumsum(1)

    def prefetch(self, indices: np.ndarray) -> None:
        """Fetch the shards of these rows ``[n]`` in the background, in their order; nothing to do for a local data set.

        A failure is raised when rows of that shard are asked for.
        """
        if self.remote:
            member, _ = self._locate(indices)
            shards = dict.fromkeys(self._shard[member].tolist())
            self.cache.prefetch([self._remote_shard(number) for number in shards])

    def copy_tokenizer(self, to: Path) -> None:
        """Write the data set's ``tokenizer.json`` to ``to``.

        Raises:
            DataError: it cannot be fetched or is another than the manifest's.
            OSError: it cannot be read here, or ``to`` not written.
        """
        name = self.manifest.tokenizer
        if self.remote:
            fetch(f"{self.folder}/{name}", to, sha256=self.manifest.tokenizer_sha256)
        else:
            self._check_digest(self.folder / name, self.manifest.tokenizer_sha256)
            shutil.copyfile(self.folder / name, to)

    @property
    def bytes(self) -> int:
        """Of all shards together."""
        return sum(shard.bytes for shard in self.shards)

    def verify(self, share: int = 0, shares: int = 1) -> None:
        """Compare the sha256 of the tokenizer and of the shards of the split with the manifest.

        Shards elsewhere are fetched for that, unless they are in the cache.

        Args:
            share, shares: which of so many equal shares of the shards; the tokenizer belongs to the first.

        Raises:
            DataError: names the first file that differs.
        """
        if self.remote:
            if share == 0:
                with tempfile.TemporaryDirectory() as folder:
                    self.copy_tokenizer(Path(folder) / self.manifest.tokenizer)
            for number in range(share, len(self.shards), shares):
                self.cache.open(self._remote_shard(number))
            return
        expected = {self.folder / self.split / shard.name: shard.sha256 for shard in self.shards[share::shares]}
        if share == 0:
            expected[self.folder / self.manifest.tokenizer] = self.manifest.tokenizer_sha256
        for path, digest in expected.items():
            self._check_digest(path, digest)

    @staticmethod
    def _check_digest(path: Path, digest: str) -> None:
        found = sha256_file(path) if path.is_file() else "missing"
        if found != digest:
            raise DataError(f"{path}: sha256 is {found[:12]}, the manifest says {digest[:12]}; {MEND}")

    @property
    def documents_started(self) -> int:
        """Documents that have a token in the rows; 0 where the data set does not say."""
        return int(self._starts.sum())

    @property
    def unfinished(self) -> np.ndarray:
        """Numbers, int64, of documents whose last tokens may have filled no row: the last one, or none."""
        cut = self.manifest.splits[self.split].dropped_tokens > 0 and self.documents_started > 0
        return np.array([self.documents_started - 1] if cut else [], np.int64)

    def shard_rows(self) -> np.ndarray:
        """Rows of each shard, int64 ``[shards]``."""
        return np.array([shard.rows for shard in self.shards], np.int64)

    def _index_members(self) -> None:
        """Where each member lies, one array per column of :class:`data_prep.format.manifest.Member`."""
        counts = [len(shard.members) for shard in self.shards]
        numbers = chain.from_iterable(chain.from_iterable(shard.members for shard in self.shards))
        columns = np.fromiter(numbers, np.int64, 4 * sum(counts)).reshape(-1, 4).T
        self._tokens_offset, self._docs_offset, rows, self._starts = map(np.ascontiguousarray, columns)
        self._shard = np.repeat(np.arange(len(counts)), counts)
        self._first_member = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        self._first = np.concatenate([[0], np.cumsum(rows)])  # row with which each member begins
        self._first_document = np.cumsum(self._starts) - self._starts  # documents that start before each member
        uniform = len(rows) > 0 and (rows[:-1] == rows[0]).all() and rows[-1] <= rows[0]
        self._rows_per_member = np.uint64(rows[0] if uniform else 0)
        sizes = np.array([shard.bytes for shard in self.shards], np.int64)[self._shard]
        bad = (self._tokens_offset + rows * self.length * self.dtype.itemsize > sizes) | (
            self._docs_offset + self._starts * 8 > sizes
        )
        bad |= (self._tokens_offset % self.dtype.itemsize != 0) | (self._docs_offset % 4 != 0)
        if bad.any():
            name = self.shards[self._shard[bad.argmax()]].name
            raise DataError(f"{self.folder}/{self.split}/{name}: its rows lie outside it in the manifest; {MEND}")

    def _reserve(self) -> Stretch | None:
        """One stretch for all shards, or None where the system has no such thing."""
        if not self.shards:
            return None
        try:
            stretch = Stretch(self._path, [shard.bytes for shard in self.shards], MEND)
        except OSError:
            return None
        size = self.length * self.dtype.itemsize
        begin = stretch.first[self._shard] + self._tokens_offset
        # Where every row begins at a multiple of its size, the stretch is an array of rows.
        aligned = bool((begin % size == 0).all())
        unit = size if aligned else self.dtype.itemsize
        self._step = size // unit  # between rows
        # Less what the number of a member's first row adds: start = table[member] + number * step.
        self._mapped_table = begin // unit - self._first[:-1] * self._step
        self._table = np.full_like(begin, _UNMAPPED)
        # The last window is the last row, so that a number too large is outside.
        last = int(begin[-1]) // unit + int(self._first[-1] - self._first[-2] - 1) * self._step
        # Each window is one opaque item, which numpy copies faster than an axis of tokens; take is faster still, but
        # it needs windows that do not overlap.
        windows = np.ndarray(last + 1, f"V{size}", buffer=stretch.bytes, strides=(unit,))
        self._pick = windows.take if aligned else windows.__getitem__
        return stretch

    def _parts(self, shard: np.ndarray) -> Iterator[tuple[slice | np.ndarray, np.ndarray, np.ndarray | int]]:
        """Where to read rows that lie in these shards ``[n]``: (which of the rows, bytes, where their shards begin)."""
        if self._stretch is not None:
            with self._lock:
                self._map_shards(np.unique(shard))
                yield slice(None), self._stretch.bytes, self._stretch.first[shard]
            return
        for number in np.unique(shard).tolist():
            # A cached shard is held for this one read only: evicted, it would take disk space as long as it is mapped.
            raw = self.cache.open(self._remote_shard(number)) if self.remote else self._map(number)
            yield shard == number, raw, 0

    def _map_shards(self, shards: np.ndarray) -> None:
        missing = shards[~self._stretch.mapped[shards]]
        if missing.size == 0:
            return
        for number in self._stretch.map(shards):
            self._table[slice(*self._first_member[number : number + 2])] = _UNMAPPED
        for number in missing.tolist():
            members = slice(*self._first_member[number : number + 2])
            self._table[members] = self._mapped_table[members]

    def _path(self, number: int) -> Path:
        return self.folder / self.split / self.shards[number].name

    def _map_file(self, number: int) -> np.ndarray:
        return map_file(self._path(number), self.shards[number].bytes, MEND)

    def _remote_shard(self, number: int) -> RemoteShard:
        shard = self.shards[number]
        return RemoteShard(f"{self.folder}/{self.split}/{shard.name}", shard.bytes, shard.sha256)

    def _locate(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(member, row within it) of each row number."""
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
        member = np.searchsorted(self._first, indices, side="right") - 1
        return member, indices - self._first[member]


def _bisect(starts: np.ndarray, begin: np.ndarray, count: np.ndarray, row: np.ndarray) -> np.ndarray:
    """For each of n searches, how many of its ``count`` pairs, from ``begin`` on, are of rows before ``row``."""
    low, high = np.zeros_like(count), count.copy()
    for _ in range(int(count.max(initial=0)).bit_length()):
        middle = (low + high) // 2
        # A finished search looks at its last pair once more, which lies inside.
        before = starts[begin + 2 * np.minimum(middle, np.maximum(count - 1, 0))] < row
        searching = low < high
        low = np.where(searching & before, middle + 1, low)
        high = np.where(searching & ~before, middle, high)
    return low


def _remote_manifest(url: str) -> Manifest:
    where = f"{url}/{MANIFEST}"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / MANIFEST
        fetch(where, path)
        return parse_manifest(path.read_bytes(), where)
