"""Kinds of input files, one a module: names they take, parts that workers read, documents that come out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

from bd3_common.registry import Registry
from data_prep.sources.inputs import Compression, Document, Part, Source
from data_prep.sources.records import Intake


class InputKind(ABC):
    """One kind of input files. Objects have no state: workers make their own."""

    suffixes: ClassVar[tuple[str, ...]]
    """ends of the names of such files, with the dot"""
    compressions: ClassVar[tuple[Compression, ...]] = ("gz", "zst")
    """compressions that :func:`data_prep.sources.streams.open_stream` unpacks; empty if the kind packs by itself"""

    @abstractmethod
    def read(self, part: Part, local: Path, intake: Intake) -> Iterator[Document]:
        """The documents that start in ``part``, in the order of the file.

        Make each with :meth:`~data_prep.sources.records.Intake.document`, which gives None for one that is left out,
        and pass a record that cannot be used to ``intake.reject(offset, reason)``.
        :func:`~data_prep.sources.streams.open_stream` opens the file, checks its size and unpacks it.

        Args:
            part: one of :meth:`parts`.
            local: the file on this machine: ``part.source.path`` itself, or the copy of a remote file.
            intake: options, and callbacks for documents that are left out.

        Raises:
            DataError: the file cannot be read, is cut or corrupt. A short read must not go unseen.
        """

    def parts(self, source: Source, target_bytes: int) -> list[Part]:
        """Parts of about ``target_bytes`` stored bytes for workers; by default the whole file is one.

        Each document starts in one part, and the parts in order give the documents in the order of the file.
        """
        return [Part(source, 0, source.bytes)]

    def stored_before(self, source: Source, local: Path, offset: int) -> float | None:
        """Stored bytes before the document at ``offset``, for estimates; None: offsets are bytes of unpacked text."""
        return None


INPUT_KINDS = Registry(InputKind, "input kind", "inputs", "bd3_megatron.input_kinds")


def kind_of(file_name: str) -> tuple[str, Compression | None] | None:
    """Name of the kind and compression of a file, by the longest suffix that fits; None: no kind takes it."""
    fitting = [(suffix, found) for suffix, found in suffixes().items() if file_name.endswith(suffix)]
    return max(fitting, key=lambda pair: len(pair[0]))[1] if fitting else None


def suffixes() -> dict[str, tuple[str, Compression | None]]:
    """Kind and compression by suffix, plugins' included."""
    found: dict[str, tuple[str, Compression | None]] = {}
    for name in INPUT_KINDS.names():
        kind = INPUT_KINDS.load(name)
        for suffix in kind.suffixes:
            found[suffix] = name, None
            found |= {f"{suffix}.{packed}": (name, packed) for packed in kind.compressions}
    return found


def readable() -> str:
    """The remedy for a file that no kind takes."""
    kinds = [INPUT_KINDS.load(name) for name in INPUT_KINDS.names()]
    names = [suffix + ("[.gz|.zst]" if kind.compressions else "") for kind in kinds for suffix in kind.suffixes]
    return f"name files that end in {', '.join(names)}"
