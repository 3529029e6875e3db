"""Tensors of a checkpoint on disk, of either format: their index, and the reading of regions into a sharded state dict.

Every rank reads the regions it needs and no others, so a checkpoint does not depend on the layout that wrote it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import Tensor

from bd3_common.errors import ConfigError
from bd3_megatron.shards import ShardedTensor
from pretrain.checkpoint.folder import Checkpoint
from pretrain.checkpoint.index import REMEDY, StoredChunk, StoredTensor, read_index
from pretrain.checkpoint.old_format import OldFile, read_old_index
from pretrain.checkpoint.tensor_file import TensorFile


class StoredTensors:
    """The tensors of a checkpoint, whose files are not opened before they are read.

    Attributes:
        tensors: by ``section/global parameter name``.

    Raises:
        ConfigError: the index is damaged.
    """

    def __init__(self, checkpoint: Checkpoint):
        self.path, self.files = checkpoint.path, checkpoint.files
        self.archives: dict[str, dict[str, int]] = {}
        self.old = checkpoint.format == 1
        self.tensors: dict[str, StoredTensor]
        try:
            if self.old:
                self.tensors, self.archives = read_old_index(self.path, self.files)
            else:
                self.tensors = read_index(self.path, self.files)
        except FileNotFoundError as error:
            raise ConfigError(f"{error.filename}: is missing; {REMEDY}") from None

    def open(self, name: str) -> TensorFile | OldFile:
        """Open one of the files for reading."""
        path = self.path / name
        return OldFile(path, self.archives[name]) if self.old else TensorFile(path)

    def fill(self, state: Mapping[str, ShardedTensor]) -> None:
        """Copy the tensors' values into the chunks of a sharded state dict with the same names and shapes.

        Raises:
            ConfigError: a file is damaged. Some chunks may have been filled.
            OSError: a file cannot be read.
        """
        by_file: dict[str, list[_Read]] = {}
        for name, sharded in state.items():
            stored = self.tensors[name]
            for chunk in stored.chunks:
                for ours in sharded.chunks:
                    overlap = _overlap(chunk, ours.offsets, ours.data.shape)
                    if overlap is not None:
                        low, target = overlap
                        by_file.setdefault(chunk.file, []).append(_Read(chunk, stored.dtype, low, ours.data[target]))
        for file, reads in by_file.items():
            with self.open(file) as opened:
                for read in reads:
                    opened.read(*read)


class _Read(NamedTuple):
    """A region to read: arguments of :meth:`pretrain.checkpoint.tensor_file.TensorFile.read`."""

    chunk: StoredChunk
    dtype: str
    low: tuple[int, ...]
    target: Tensor


def _overlap(
    chunk: StoredChunk, offsets: Sequence[int], shape: Sequence[int]
) -> tuple[tuple[int, ...], tuple[slice, ...]] | None:
    """The region that a stored chunk shares with another: its begin in the former, its place in the latter.

    None: they share none.
    """
    lows, target = [], []
    for ours, size, theirs, extent in zip(offsets, shape, chunk.offsets, chunk.shape):
        low, high = max(ours, theirs), min(ours + size, theirs + extent)
        if low >= high:
            return None
        lows.append(low - theirs)
        target.append(slice(low - ours, high - ours))
    return tuple(lows), tuple(target)
