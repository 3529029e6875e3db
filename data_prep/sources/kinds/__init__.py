"""Input kinds, one per module: file name suffixes, splitting into parts, reading of documents."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

from bd3_common.registry import Registry
from data_prep.sources.inputs import Compression, Document, Part, Source
from data_prep.sources.records import Intake


class InputKind(ABC):
    """One kind of input files. Instances have no state; each worker process has its own."""

    suffixes: ClassVar[tuple[str, ...]]
    """suffixes of file names, with the dot"""
    compressions: ClassVar[tuple[Compression, ...]] = ("gz", "zst")
    """compressions that :func:`~data_prep.sources.streams.open_stream` decompresses; empty if the format has its own"""

    @abstractmethod
    def read(self, part: Part, local: Path, intake: Intake) -> Iterator[Document]:
        """Yield the documents that start in ``part``, in the order of the file.

        Make each with :meth:`~data_prep.sources.records.Intake.document`, which returns None for one to skip, and pass
        a record that cannot be used to ``intake.reject(offset, reason)``.
        :func:`~data_prep.sources.streams.open_stream` opens the file, checks its size and decompresses it.

        Args:
            part: one of :meth:`parts`.
            local: the file on this machine: ``part.source.path`` itself, or the copy of a remote file.
            intake: options, and callbacks for skipped documents and bad records.

        Raises:
            DataError: the file cannot be read, is cut or corrupt. A short read must raise, too.
        """

    def parts(self, source: Source, target_bytes: int) -> list[Part]:
        """Split a file into parts of about ``target_bytes`` stored bytes; by default into one.

        Each document starts in one part, and the parts in order give the documents in the order of the file.
        """
        return [Part(source, 0, source.bytes)]

    def stored_before(self, source: Source, local: Path, offset: int) -> float | None:
        """Stored bytes before the document at ``offset``, for estimates; None: offsets are uncompressed bytes."""
        return None


INPUT_KINDS = Registry(InputKind, "input kind", "inputs", "bd3_megatron.input_kinds")


def kind_of(file_name: str) -> tuple[str, Compression | None] | None:
    """Kind and compression of a file, by the longest matching suffix; None: no kind matches."""
    matching = [(suffix, found) for suffix, found in suffixes().items() if file_name.endswith(suffix)]
    return max(matching, key=lambda pair: len(pair[0]))[1] if matching else None


def suffixes() -> dict[str, tuple[str, Compression | None]]:
    """Kind and compression by suffix, including plugins."""
    found: dict[str, tuple[str, Compression | None]] = {}
    for name, kind in INPUT_KINDS.load_all().items():
        for suffix in kind.suffixes:
            found[suffix] = name, None
            found |= {f"{suffix}.{packed}": (name, packed) for packed in kind.compressions}
    return found


def readable() -> str:
    """Remedy for a file of no known kind."""
    kinds = INPUT_KINDS.load_all().values()
    names = [suffix + ("[.gz|.zst]" if kind.compressions else "") for kind in kinds for suffix in kind.suffixes]
    return f"name files that end in {', '.join(names)}"
