"""Tar shards of rows: valid WebDataset, equal bytes for equal rows, written atomically.

``tarfile`` writes them. ``webdataset.TarWriter(mtime=0)`` is as reproducible, but it imports torch and does not give
the offsets of payloads, which the manifest records.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from bd3_common.atomic import atomic_file
from data_prep.format.files import sha256_file
from data_prep.format.manifest import Member, Shard
from data_prep.format.pack import Rows

_NPY_TEXT = 10  # bytes of an npy file (version 1.0) before its header's text; the last two are the text's length


def shard_name(split: str, number: int) -> str:
    return f"{split}-{number:06d}.tar"


def write_shard(folder: Path, split: str, number: int, samples: Iterable[Rows]) -> Shard:
    """Write ``<folder>/<split>-<number>.tar``, one WebDataset sample for each of ``samples``.

    A sample has the key ``<split>-<shard>-<member>``, unique in the data set, and the parts ``tokens.npy``
    ``[n, L]`` and ``docs.npy`` ``[m, 2]`` (:class:`data_prep.format.pack.Rows`). The file appears under its name
    once all of it is on disk.

    Raises:
        OSError: the disk is full or cannot be written; nothing is left.
    """
    path = folder / shard_name(split, number)
    members: list[Member] = []
    with atomic_file(path) as temporary:
        # Large writes make large pages in the page cache, which are faster to read.
        with tarfile.TarFile(temporary, "w", format=tarfile.USTAR_FORMAT, copybufsize=8 << 20) as tar:
            for rows in samples:
                key = f"{split}-{number:06d}-{len(members):06d}"
                tokens = _add(tar, f"{key}.tokens.npy", rows.tokens, _alignment(rows.tokens[0].nbytes))
                docs = _add(tar, f"{key}.docs.npy", rows.docs)
                members.append(Member(tokens, docs, len(rows.tokens), len(rows.docs)))
        size, digest = temporary.stat().st_size, sha256_file(temporary)
    return Shard(
        name=path.name, bytes=size, sha256=digest, rows=sum(member.rows for member in members), members=list(members)
    )


def _add(tar: tarfile.TarFile, name: str, array: np.ndarray, align: int = 1) -> int:
    """Append ``array`` as an npy file; returns the offset of its raw bytes in the tar, a multiple of ``align``.

    Spaces at the end of the npy header, which the format allows, align the data.
    """
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, np.lib.format.header_data_from_array_1_0(array))
    header = buffer.getvalue()
    begin = tar.offset + tarfile.BLOCKSIZE  # after the member's header
    text = header[_NPY_TEXT:-1] + b" " * (-(begin + len(header)) % align) + b"\n"
    content = header[: _NPY_TEXT - 2] + len(text).to_bytes(2, "little") + text + array.tobytes()
    info = tarfile.TarInfo(name)  # owner 0, mtime 0: the bytes depend on name and content alone
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))
    return begin + len(content) - array.nbytes


def _alignment(row_bytes: int) -> int:
    """Alignment of rows in a tar: their size if that is a power of two, which is faster to read. The limit is because
    numpy refuses headers of more than 10,000 bytes."""
    return row_bytes if row_bytes & (row_bytes - 1) == 0 and row_bytes <= 8192 else 1
