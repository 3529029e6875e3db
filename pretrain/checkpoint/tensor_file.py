"""Safetensors files: written from tensors in place without a copy, and read by regions.

Files are read with pread instead of memory maps: a failing disk is then an error and no signal that ends the process.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bd3_common.errors import ConfigError
from bd3_common.formats.tensor_header import open_tensors, read_header
from bd3_common.formats.tensor_writer import TensorEntry, write_tensors
from bd3_megatron.hf.files import bytes_of
from pretrain.checkpoint.index import DTYPES, REMEDY, StoredChunk

_BUFFER = 16 << 20
"""bytes that are read at a time"""


class ChunkEntry(NamedTuple):
    """A chunk to write: name, dtype and shape of the whole tensor, and its place in that."""

    name: str
    dtype: str
    whole: tuple[int, ...]
    offsets: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def key(self) -> str:
        """Name in the file: the tensor's, with ``[offsets]`` if the chunk is a part of it."""
        return self.name if self.shape == self.whole else f"{self.name}[{','.join(map(str, self.offsets))}]"

    @property
    def place(self) -> dict[str, tuple[int, ...]]:
        """Its place in the whole tensor, as in the index."""
        return {"offsets": self.offsets, "shape": self.shape}


def write_chunks(path: Path, chunks: Sequence[ChunkEntry], tensors: Iterable[Tensor]) -> dict[str, Any]:
    """Write and sync a file of chunks.

    Args:
        tensors: contiguous, on the CPU, in the order of ``chunks``; taken one at a time.

    Returns:
        ``tensors``: this file's part of the index; ``files``: its stamp by its name. Both are plain values.

    Raises:
        OSError: it cannot be written.
    """
    entries = [TensorEntry(chunk.key, chunk.dtype, chunk.shape) for chunk in chunks]
    stamp = write_tensors(path, entries, map(bytes_of, tensors))
    found: dict[str, Any] = {}
    for chunk in chunks:
        tensor = found.setdefault(chunk.name, {"shape": list(chunk.whole), "dtype": chunk.dtype, "chunks": []})
        place = {axis: list(sizes) for axis, sizes in chunk.place.items()}
        tensor["chunks"].append({**place, "file": path.name, "key": chunk.key})
    return {"tensors": found, "files": {path.name: stamp}}


class TensorFile:
    """A safetensors file open for reading, its header checked.

    Raises:
        ConfigError: the header is damaged, or describes another file than this one.
    """

    def __init__(self, path: Path):
        self.path = path
        self._file = open_tensors(path)
        try:
            self._tensors, _, self._begin = read_header(self._file, path, ConfigError, REMEDY)
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def read(self, chunk: StoredChunk, dtype: str, low: Sequence[int], target: Tensor) -> None:
        """Copy the region of a chunk that begins at ``low`` and has ``target``'s shape into ``target``.

        Raises:
            ConfigError: the file has no such tensor, or one of another shape or dtype.
        """
        entry = self._tensors.get(chunk.key)
        if entry is None or (entry.dtype, tuple(entry.shape)) != (dtype, chunk.shape):
            raise self._damaged(f"has no {chunk.key} of shape {list(chunk.shape)} and dtype {dtype}")
        for at, part in _parts(tuple(low), target):
            direct = part.is_contiguous() and part.device.type == "cpu" and part.dtype is DTYPES[dtype]
            buffer = part if direct else torch.empty(part.shape, dtype=DTYPES[dtype])
            view = memoryview(bytes_of(buffer))
            for place, begin, end in _runs(chunk.shape, at, part.shape):
                size = buffer.element_size()
                self._pread(view[begin * size : end * size], self._begin + entry.data_offsets[0] + place * size)
            if not direct:
                part.copy_(buffer)

    def _pread(self, view: memoryview, place: int) -> None:
        while len(view):
            count = os.preadv(self._file.fileno(), [view], place)
            if count == 0:
                raise self._damaged("has become shorter")
            view, place = view[count:], place + count

    def _damaged(self, reason: str) -> ConfigError:
        return ConfigError(f"{self.path}: {reason}; {REMEDY}")


def _parts(low: tuple[int, ...], target: Tensor) -> Iterator[tuple[tuple[int, ...], Tensor]]:
    """Parts of the target that fit into the buffer, with their places."""
    if target.nbytes <= _BUFFER:
        yield low, target
        return
    axis = next(axis for axis, size in enumerate(target.shape) if size > 1)
    half = target.shape[axis] // 2
    yield from _parts(low, target.narrow(axis, 0, half))
    later = (*low[:axis], low[axis] + half, *low[axis + 1 :])
    yield from _parts(later, target.narrow(axis, half, target.shape[axis] - half))


def _runs(shape: Sequence[int], low: Sequence[int], sizes: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """Runs of a region's elements that lie one after the other in the array.

    Yields:
        place of the run's first element in the array; first and end of the run in the region.
    """
    axis = len(shape) - 1
    while axis > 0 and sizes[axis] == shape[axis]:
        axis -= 1
    strides = [math.prod(shape[n + 1 :]) for n in range(len(shape))]
    first = sum(at * stride for at, stride in zip(low, strides))
    length = math.prod(sizes[axis:])
    for number, index in enumerate(itertools.product(*map(range, sizes[:axis]))):
        place = first + sum(at * stride for at, stride in zip(index, strides))
        yield place, number * length, (number + 1) * length
