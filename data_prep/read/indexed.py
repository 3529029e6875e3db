"""Rows of token tars of another program: cut from the indexed samples and read in place."""

from __future__ import annotations

import io
import math
import operator
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import lru_cache
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from bd3_common.schema import MAX_COUNT, tree
from bd3_common.text import shorten
from data_prep.errors import DataError
from data_prep.format.manifest import IndexedShard
from data_prep.read.open_files import ShardFile, bytes_of

ID_FIELDS = ("input_ids", "tokens", "ids")
"""keys of a JSON object under which its list of ids is looked for, in this order"""

Ids = NDArray[np.integer[Any]]


def json_ids(payload: bytes) -> Ids:
    """Ids of a ``.json`` member, int64 ``[n]``: a list of numbers, a list of such lists, or an object that has one.

    Raises:
        ValueError: it holds no list of integers of 64 bits; the text says what it holds.
    """
    content = tree(payload)
    if isinstance(content, dict):
        found = next((name for name in ID_FIELDS if name in content), None)
        if found is None:
            raise ValueError(f"an object without {', '.join(ID_FIELDS)}")
        content = content[found]
    if isinstance(content, list) and content and all(isinstance(part, list) for part in content):
        content = [number for part in content for number in part]
    if not isinstance(content, list) or any(type(number) is not int for number in content):
        raise ValueError("no list of integers")
    try:
        return np.array(content, np.int64)
    except OverflowError:
        raise ValueError("an integer of more than 64 bits") from None


def npy_ids(payload: bytes) -> tuple[Ids, int]:
    """Ids of a ``.npy`` member, ``[n]``, and where they begin in it. Objects are refused: they would be unpickled.

    Raises:
        ValueError: no npy file of version 1 or 2, no integers in C order, or another size than its header says.
    """
    dtype, shape, begin = _npy_header(io.BytesIO(payload), len(payload))
    return np.frombuffer(payload, dtype, offset=begin, count=math.prod(shape)), begin


def most_index_bytes(shards: Sequence[IndexedShard]) -> int:
    """Bytes that the index of these shards has at most: three integers of a sample, and the longest npy header."""
    return 3 * 8 * sum(shard.samples for shard in shards) + 12 + (1 << 16)


def npy_file(path: Path) -> Ids:
    """The array of an npy file, mapped; refusals and errors as :func:`npy_ids`."""
    with path.open("rb") as stream:
        dtype, shape, begin = _npy_header(stream, path.stat().st_size)
    return np.memmap(path, dtype, "r", begin, shape) if math.prod(shape) else np.empty(shape, dtype)


def _npy_header(stream: IO[bytes], size: int) -> tuple[np.dtype[Any], tuple[int, ...], int]:
    """Type, shape and first byte of the integers in an npy file of ``size`` bytes."""
    try:
        version = np.lib.format.read_magic(stream)
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        stated, fortran, dtype = read_header(stream)
        shape = tuple(map(operator.index, stated))
    except Exception as error:  # of a header made by anybody: numpy's own and those of Python's parser
        raise ValueError(f"no npy header that can be read ({type(error).__name__})") from None
    if dtype.kind not in "iu":
        raise ValueError(f"{dtype} instead of integers")
    if fortran and len(shape) > 1:
        raise ValueError("in Fortran order")
    begin = stream.tell()
    if min(shape, default=0) < 0 or begin + math.prod(shape) * dtype.itemsize != size:
        raise ValueError(f"{size} bytes, others by its header: {dtype}{shorten(list(shape))}")
    return dtype, shape, begin


class IndexedRows:
    """Rows of one split by number, and the documents in them, which are the samples.

    Args:
        shards: of the split.
        index: int64 ``[samples, 3]``, see :class:`data_prep.format.manifest.IndexedSplit`.
        length: ids in a row, L.
        dtype: of the rows.
        vocab_size: ids in the rows are below it.
        file: opens shard ``n``.

    Raises:
        ValueError: the index does not fit the shards.
    """

    def __init__(
        self,
        shards: Sequence[IndexedShard],
        index: NDArray[Any],
        length: int,
        dtype: np.dtype[Any],
        vocab_size: int,
        file: Callable[[int], AbstractContextManager[ShardFile]],
    ):
        self._shards, self._length, self._dtype, self._file = shards, length, dtype, file
        self._vocab_size = vocab_size
        total = sum(shard.samples for shard in shards)
        if index.shape != (total, 3) or index.dtype != np.int64 or (index < 0).any():
            raise ValueError(f"{index.dtype}{list(index.shape)} instead of int64[{total}, 3]")
        counts = np.array([shard.samples for shard in shards], np.int64)
        self._shard = np.repeat(np.arange(len(shards)), counts)
        self._offset, self._bytes, ids = np.ascontiguousarray(index.T)
        sizes = np.array([shard.bytes for shard in shards], np.int64)[self._shard]
        widths = np.array([np.dtype(shard.dtype).itemsize if shard.dtype else 1 for shard in shards])[self._shard]
        # Compared without sums and products, which could pass the range of int64.
        if (self._offset > sizes).any() or (self._bytes > sizes - self._offset).any():
            raise ValueError("samples outside their shards")
        if (ids > self._bytes // widths).any() or sum(ids.tolist()) > MAX_COUNT:
            raise ValueError("samples of more ids than their bytes hold")
        # Place of each sample in the stream of the split, in which the shards' rows lie one after another.
        rows = np.array([shard.rows for shard in shards], np.int64)
        ends, first = np.cumsum(ids), np.concatenate([[0], np.cumsum(counts)])
        before = np.concatenate([[0], ends])[first]  # ids of the shards before, with those that fill no row
        if ((before[1:] - before[:-1]) // length != rows).any():
            raise ValueError("other rows than the manifest says")
        begins = (np.cumsum(rows) - rows) * length
        start = ends - ids - before[self._shard] + begins[self._shard]
        limit = (begins + rows * length)[self._shard]
        kept = start < limit
        self._start, self._shard = start[kept], self._shard[kept]
        self._offset, self._bytes = self._offset[kept], self._bytes[kept]
        self.unfinished: NDArray[np.int64] = np.flatnonzero((start + ids > limit)[kept])
        """numbers of the documents whose last ids fill no row"""
        self._json = lru_cache(64)(self._read_json)

    @property
    def documents(self) -> int:
        """Samples that have an id in the rows."""
        return len(self._start)

    def rows(self, indices: NDArray[np.int64]) -> NDArray[Any]:
        """Rows ``[n, L]`` of row numbers ``[n]``, each in the range of the split.

        Raises:
            DataError: a shard is gone, cut or replaced.
        """
        out = np.empty((len(indices), self._length), self._dtype)
        for at in np.argsort(indices, kind="stable").tolist():
            begin = int(indices[at]) * self._length
            end, place = begin + self._length, begin
            sample = int(np.searchsorted(self._start, begin, side="right")) - 1
            while place < end:
                start = int(self._start[sample])
                stop = int(self._start[sample + 1]) if sample + 1 < len(self._start) else end
                stop = min(stop, end)
                out[at, place - begin : stop - begin] = self._ids(sample, place - start, stop - start)
                place, sample = stop, sample + 1
        return out

    def document_numbers(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """Number of the document of each position of rows ``[n]``, int64 ``[n, L]``."""
        places = indices[:, None] * self._length + np.arange(self._length)
        return np.searchsorted(self._start, places, side="right") - 1

    def _ids(self, sample: int, begin: int, end: int) -> Ids:
        """Ids ``[begin, end)`` of a sample."""
        number = int(self._shard[sample])
        shard = self._shards[number]
        if shard.encoding == "json":
            ids = self._json(sample)[begin:end]
        else:
            dtype = np.dtype(shard.dtype)
            ids = np.empty(end - begin, dtype)
            with self._file(number) as file:
                file.read_into(bytes_of(ids), int(self._offset[sample]) + begin * dtype.itemsize)
        if len(ids) < end - begin or (ids < 0).any() or (ids >= self._vocab_size).any():
            raise DataError(
                f"{shard.name}: byte {self._offset[sample]}: fewer ids than indexed, or ids outside the vocabulary of "
                f"{self._vocab_size}; was it changed since it was indexed?"
            )
        return ids

    def _read_json(self, sample: int) -> Ids:
        payload = np.empty(int(self._bytes[sample]), np.uint8)
        with self._file(int(self._shard[sample])) as file:
            file.read_into(bytes_of(payload), int(self._offset[sample]))
            path = file.path
        try:
            return json_ids(payload.tobytes())
        except ValueError as error:
            raise DataError(
                f"{path}: byte {self._offset[sample]}: {error}; was it changed since it was indexed?"
            ) from None
