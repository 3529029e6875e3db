"""Documents streamed from text files.

:func:`expand` finds the files, :func:`split` cuts them into parts for parallel work, and :func:`read_part` streams
the documents of one part. A bad record goes to a callback and reading continues; a file that cannot be read to its
end raises an error. Kinds of files are in :mod:`data_prep.sources.kinds`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from data_prep.sources.find import expand
from data_prep.sources.inputs import Document, Fields, Part, Source
from data_prep.sources.kinds import INPUT_KINDS
from data_prep.sources.records import Intake
from data_prep.sources.streams import sha256_source

__all__ = ["Document", "Fields", "Part", "Source", "expand", "read_part", "sha256_source", "split"]


def split(source: Source, target_bytes: int = 64 << 20) -> list[Part]:
    """Cut a file into parts of about ``target_bytes`` stored bytes each, without reading it.

    Every document starts in exactly one part, and the parts in order give the documents in the order of the file. A
    worker fetches the whole of a remote file to read a part of it.

    Raises:
        DataError: local Parquet whose footer cannot be read, or pyarrow is missing.
    """
    return INPUT_KINDS.instance(source.kind).parts(source, max(1, target_bytes))


def read_part(
    part: Part, local: Path, fields: Fields, reject: Callable[[int, str], None], skipped: Callable[[str], None]
) -> Iterator[Document]:
    """Stream the documents that start in ``part``, in the order of the file; memory use is bounded.

    Offsets count from the start of the whole file, not of the part: the byte at which the record's line starts in
    the unpacked text (JSONL, text), the row (Parquet), or the byte of the member's payload in the unpacked tar. A
    document without an id gets the id ``<file name>:<offset>`` (in a tar: its key); ids may repeat. Blank lines are
    skipped.

    Args:
        part: one of :func:`split`.
        local: the file on this machine: ``part.source.path`` itself, or the copy of a remote file.
        fields: names of the text and id fields, and the lengths to keep.
        reject: called with (offset, one-line reason) for a record that cannot be used; reading continues.
        skipped: called with ``"short"`` or ``"long"`` for a document outside of ``min_chars`` and ``max_chars``;
            a blank text is short.

    Raises:
        DataError: the file cannot be read, is cut or corrupt, or has changed since it was listed; a Parquet file
            lacks the column; zstandard or pyarrow is missing. Documents before the damage have been yielded.
    """
    return INPUT_KINDS.instance(part.source.kind).read(part, local, Intake(part.source.name, fields, reject, skipped))
