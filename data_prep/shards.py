"""Writing rows as tar shards: valid WebDataset, equal bytes for equal rows, no half-written file.

Python's ``tarfile`` does the writing. ``webdataset.TarWriter(mtime=0)`` gives equally reproducible tars, but
importing it imports torch, and it does not tell where a payload lies, which the manifest records.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from data_prep.files import sha256_file, written
from data_prep.manifest import Member, Shard
from data_prep.pack import Rows


def shard_name(split: str, number: int) -> str:
    return f"{split}-{number:06d}.tar"


def write_shard(folder: Path, split: str, number: int, samples: Iterable[Rows]) -> Shard:
    """Write ``<folder>/<split>-<number>.tar``, one WebDataset sample for each of ``samples``.

    A sample has the key ``<split>-<shard>-<member>``, unique over the data set, and the parts ``tokens.npy``
    ``[n, L]`` and ``docs.npy`` ``[m, 2]`` (see :class:`data_prep.pack.Rows`). The file appears under its name once all
    of it is on the disk.

    Raises:
        OSError: as the disk does; nothing is left then.
    """
    path = folder / shard_name(split, number)
    members = []
    with written(path) as temporary:
        # Large writes leave large pages in the page cache, from which rows are read faster.
        with tarfile.open(temporary, "w", format=tarfile.USTAR_FORMAT, copybufsize=8 << 20) as tar:
            for rows in samples:
                key = f"{split}-{number:06d}-{len(members):06d}"
                tokens = _add(tar, f"{key}.tokens.npy", rows.tokens)
                docs = _add(tar, f"{key}.docs.npy", rows.docs)
                members.append(Member(tokens, docs, len(rows.tokens), len(rows.docs)))
        size, digest = temporary.stat().st_size, sha256_file(temporary)
    return Shard(
        name=path.name, bytes=size, sha256=digest, rows=sum(member.rows for member in members), members=members
    )


def _add(tar: tarfile.TarFile, name: str, array: np.ndarray) -> int:
    """Append ``array`` as an npy file and return the offset of its raw bytes in the tar."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    info = tarfile.TarInfo(name)  # owner 0, mtime 0: the bytes depend on name and content alone
    info.size = buffer.tell()
    buffer.seek(0)
    tar.addfile(info, buffer)
    padded = -(-info.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
    return tar.offset - padded + info.size - array.nbytes
