"""Writing rows as tar shards: valid WebDataset, equal bytes for equal rows, no half-written file.

Python's ``tarfile`` does the writing. ``webdataset.TarWriter(mtime=0)`` gives equally reproducible tars, but
importing it imports torch, and it does not tell where a payload lies, which the manifest records.
"""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path

import numpy as np

from data_prep.manifest import Member, Shard, sha256_file
from data_prep.pack import Rows


class ShardWriter:
    """Writes chunks of rows, one WebDataset sample each, to ``<folder>/<split>-<number>.tar``.

    A sample has the key ``<split>-<shard>-<member>``, unique over the data set, and the parts ``tokens.npy``
    ``[n, L]`` and ``docs.npy`` ``[m, 2]`` (see :class:`data_prep.pack.Rows`). A shard is closed once it holds
    ``rows_per_shard`` rows.
    """

    def __init__(self, folder: Path, split: str, rows_per_shard: int):
        self.folder, self.split, self.rows_per_shard = folder, split, rows_per_shard
        self.shards: list[Shard] = []
        self._members: list[Member] = []
        self._tar: tarfile.TarFile | None = None
        folder.mkdir()

    def write(self, rows: Rows) -> None:
        """Append one sample. Raises OSError where the disk does."""
        if self._tar is None:
            self._tar = tarfile.open(self._temporary, "w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115
        key = f"{self.split}-{len(self.shards):06d}-{len(self._members):06d}"
        tokens = self._add(f"{key}.tokens.npy", rows.tokens)
        docs = self._add(f"{key}.docs.npy", rows.docs)
        self._members.append(Member(tokens, docs, len(rows.tokens), len(rows.docs)))
        if sum(member.rows for member in self._members) >= self.rows_per_shard:
            self._close_shard()

    def close(self) -> list[Shard]:
        """Finish the last shard and return all of them, in order."""
        if self._tar is not None:
            self._close_shard()
        sync(self.folder)
        return self.shards

    @property
    def _temporary(self) -> Path:
        return self.folder / f"{self.split}-{len(self.shards):06d}.tar.tmp"

    def _add(self, name: str, array: np.ndarray) -> int:
        """Append ``array`` as an npy file and return the offset of its raw bytes in the tar."""
        buffer = io.BytesIO()
        np.save(buffer, array, allow_pickle=False)
        info = tarfile.TarInfo(name)  # owner 0, mtime 0: the bytes depend on name and content alone
        info.size = buffer.tell()
        buffer.seek(0)
        self._tar.addfile(info, buffer)
        padded = -(-info.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
        return self._tar.offset - padded + info.size - array.nbytes

    def _close_shard(self) -> None:
        self._tar.close()
        temporary, self._tar = self._temporary, None
        final = temporary.with_suffix("")
        sync(temporary)
        temporary.rename(final)
        rows = sum(member.rows for member in self._members)
        self.shards.append(
            Shard(
                name=final.name,
                bytes=final.stat().st_size,
                sha256=sha256_file(final),
                rows=rows,
                members=self._members,
            )
        )
        self._members = []


def sync(path: Path) -> None:
    """Have the system write a file, or a folder's entries, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
