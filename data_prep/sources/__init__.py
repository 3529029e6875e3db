"""Documents streamed from files of text or token ids.

:func:`find` lists the files, :func:`split` cuts them into parts for parallel work, and :func:`read_part` streams
the documents of one part. A bad record goes to a callback and reading continues; a file that cannot be read to its
end raises an error. Kinds of files are in :mod:`data_prep.sources.kinds`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from data_prep.sources.find import Listing, expand, find
from data_prep.sources.inputs import AnyDocument, Document, Fields, Part, Source, TokenDocument
from data_prep.sources.kinds import INPUT_KINDS
from data_prep.sources.records import Intake
from data_prep.sources.streams import sha256_files

__all__ = [
    "AnyDocument",
    "Document",
    "Fields",
    "Listing",
    "Part",
    "Source",
    "TokenDocument",
    "expand",
    "find",
    "holds_tokens",
    "read_part",
    "sha256_source",
    "split",
]


def split(source: Source, target_bytes: int = 64 << 20) -> list[Part]:
    """Cut a file into parts of about ``target_bytes`` stored bytes each, without reading it.

    Every document starts in exactly one part, and the parts in order give the documents in the order of the file. A
    worker fetches the whole of a remote file to read a part of it.

    Raises:
        DataError: local Parquet whose footer cannot be read, a damaged pair of token files, or pyarrow is missing.
    """
    return INPUT_KINDS.instance(source.kind).parts(source, max(1, target_bytes))


def read_part(
    part: Part,
    local: Path,
    fields: Fields,
    reject: Callable[[int, str], None],
    skipped: Callable[[str], None],
    removed: Callable[[int], None] = lambda count: None,
) -> Iterator[AnyDocument]:
    """Stream the documents that start in ``part``, in the order of the file; memory use is bounded.

    Offsets count from the start of the whole file, not of the part: the byte at which the record's line or object
    starts in the unpacked text (JSON, text), the row (Parquet, Arrow), the document (token files), or the byte of the
    member's payload in the unpacked tar. A document without an id gets the id ``<file name>:<offset>`` (in a tar: its
    key); ids may repeat. Blank lines are skipped.

    Args:
        part: one of :func:`split`.
        local: the file on this machine: ``part.source.path`` itself, or the copy of a remote file.
        fields: names of the text and id fields, and the lengths to keep.
        reject: called with (offset, one-line reason) for each document that cannot be used; reading continues.
        skipped: called with one word for each document that is left out on purpose: ``"short"`` or ``"long"`` outside
            of ``min_chars`` and ``max_chars`` (a blank text is short); in tars ``"hidden"`` members, ``"unnamed"`` ones
            without an extension, and a ``"member"`` that is a text beside the one of its sample.
        removed: called with the number of NUL characters that were removed from one document.

    Raises:
        DataError: the file cannot be read, is cut or corrupt, is UTF-16, or has changed since it was listed; a table
            lacks the column; a package is missing. Documents before the damage have been yielded.
    """
    intake = Intake(part.source.name, fields, reject, skipped, removed)
    return INPUT_KINDS.instance(part.source.kind).read(part, local, intake)


def holds_tokens(source: Source) -> bool:
    """True if the documents of a file are token ids, not text."""
    return INPUT_KINDS.load(source.kind).holds_tokens


def sha256_source(source: Source, local: Path) -> str:
    """sha256 of the stored bytes, of a pair those of both files; raises DataError if they cannot be read."""
    partner = INPUT_KINDS.load(source.kind).partner
    return sha256_files(source, [local, local.with_suffix(partner)] if partner else [local])
