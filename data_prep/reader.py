"""Reading rows by number from memory-mapped shards."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy as np

from data_prep.errors import DataError
from data_prep.files import sha256_file
from data_prep.manifest import MEND, SplitName, check_files, load_manifest

MAPS_KEPT = 256  # each open map holds a file descriptor; systems commonly allow 1024


class RowReader:
    """Serves the rows of one split by global number: shard after shard in the manifest's order.

    Raises:
        DataError: no data set there, or a shard whose size is not the manifest's.
    """

    def __init__(self, folder: str | Path, split: SplitName):
        self.folder = Path(folder)
        self.split = split
        self.manifest = load_manifest(folder)
        if split not in self.manifest.splits:
            raise DataError(f"{folder}: no split {split!r}; it has {', '.join(self.manifest.splits)}")
        check_files(self.folder, self.manifest, (split,))
        self.length = self.manifest.length
        self.dtype = np.dtype(self.manifest.dtype)
        self.shards = self.manifest.splits[split].shards
        members = [(number, *member) for number, shard in enumerate(self.shards) for member in shard.members]
        columns = np.array(members, np.int64).reshape(-1, 5).T
        self._shard, self._tokens_offset, self._docs_offset, rows, self._starts = columns
        self._first = np.concatenate([[0], np.cumsum(rows)])  # row with which each member begins
        self._first_document = np.cumsum(self._starts) - self._starts  # documents that start before each member
        self._map = lru_cache(MAPS_KEPT)(self._open)

    def __len__(self) -> int:
        return int(self._first[-1])

    def rows(self, indices: np.ndarray) -> np.ndarray:
        """Rows ``[n, length]`` in the stored type for row numbers ``[n]``; one gather per shard touched.

        Raises:
            IndexError: a number is not in ``[0, len(self))``.
        """
        member, local = self._locate(indices)
        row_bytes = self.length * self.dtype.itemsize
        start = (self._tokens_offset[member] + local * row_bytes) // self.dtype.itemsize
        shard = self._shard[member]
        out = np.empty((len(start), self.length), self.dtype)
        for number in np.unique(shard):
            here = shard == number
            windows = self._map(int(number))[1]
            out[here] = windows[start[here]]
        return out

    def documents(self, indices: np.ndarray) -> np.ndarray:
        """Which document each position of rows ``[n]`` belongs to, ``[n, length]`` int64.

        Documents are counted through the split, so that one that goes on in the next row has the same number there.

        Raises:
            IndexError: as :meth:`rows`.
        """
        out = np.zeros((len(indices), self.length), np.int64)
        for row, member, local in zip(out, *self._locate(indices)):
            begin, count = self._docs_offset[member], self._starts[member]
            raw = self._map(int(self._shard[member]))[0]
            docs = raw[begin : begin + count * 8].view("<i4").reshape(count, 2)
            low, high = np.searchsorted(docs[:, 0], [local, local + 1])
            row[docs[low:high, 1]] = 1
            row[0] += self._first_document[member] + low - 1  # the document that the rows before end with
        return out.cumsum(1)

    def verify(self) -> None:
        """Compare the sha256 of the tokenizer and of every shard of the split with the manifest.

        Raises:
            DataError: names the first file that differs.
        """
        expected = {self.folder / self.manifest.tokenizer: self.manifest.tokenizer_sha256}
        expected |= {self.folder / self.split / shard.name: shard.sha256 for shard in self.shards}
        for path, digest in expected.items():
            found = sha256_file(path) if path.is_file() else "missing"
            if found != digest:
                raise DataError(f"{path}: sha256 is {found[:12]}, the manifest says {digest[:12]}; {MEND}")

    def _open(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """A shard, mapped: its bytes ``[size]``, and every window of it that is one row long ``[m, length]``.

        Both are views: picking rows from the windows reads and copies those rows only.
        """
        raw = np.asarray(np.memmap(self.folder / self.split / self.shards[number].name, np.uint8, mode="r"))
        return raw, np.lib.stride_tricks.sliding_window_view(raw.view(self.dtype), self.length)

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
