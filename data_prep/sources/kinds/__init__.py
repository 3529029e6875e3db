"""Input kinds, one per module: how files are told, splitting into parts, reading of documents."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Set
from pathlib import Path
from typing import ClassVar, NamedTuple, get_args

from bd3_common.registry import Registry
from data_prep.sources.inputs import PACKED, AnyDocument, Compression, Part, Source
from data_prep.sources.records import Intake


class FolderContent(NamedTuple):
    """Files and folders to read of a folder that a kind knows as a whole."""

    paths: tuple[Path, ...]
    described: Set[str]  # names of entries that describe it and hold no documents
    note: str = ""  # one line for the user


class InputKind(ABC):
    """One kind of input files. Instances have no state; each worker process has its own."""

    suffixes: ClassVar[tuple[str, ...]]
    """suffixes of file names, with the dot; letters of any case match"""
    compressions: ClassVar[tuple[Compression, ...]] = get_args(Compression)
    """compressions that :func:`~data_prep.sources.streams.open_stream` decompresses; empty if the format has its own"""
    packed_suffixes: ClassVar[Mapping[str, Compression]] = {}
    """further suffixes that stand for a compressed file, with its compression"""
    magic: ClassVar[bytes] = b""
    """bytes at the beginning and at the end of every file of the kind; they tell local files of any name"""
    partner: ClassVar[str] = ""
    """suffix of a second file that belongs to each, beside it and otherwise of the same name"""
    holds_tokens: ClassVar[bool] = False
    """True: documents are token ids, made with :meth:`~data_prep.sources.records.Intake.tokens`"""

    @abstractmethod
    def read(self, part: Part, local: Path, intake: Intake) -> Iterator[AnyDocument]:
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

    def content_of(self, folder: Path, names: Set[str]) -> FolderContent | None:
        """Files of a local folder that is one thing of this kind; None for any other folder.

        Args:
            names: names of its entries.

        Raises:
            DataError: it is one, and damaged.
        """
        return None

    def stored_before(self, source: Source, local: Path, offset: int) -> float | None:
        """Stored bytes before the document at ``offset``, for estimates; None: offsets are uncompressed bytes."""
        return None


INPUT_KINDS = Registry(InputKind, "input kind", "inputs", "bd3_megatron.input_kinds")


def kind_of(file_name: str) -> tuple[str, Compression | None] | None:
    """Kind and compression of a file, by the longest matching suffix in letters of any case; None: no kind matches."""
    name = file_name.lower()
    return next((found for suffix, found in _longest_first(tuple(INPUT_KINDS.names())) if name.endswith(suffix)), None)


def suffixes() -> dict[str, tuple[str, Compression | None]]:
    """Kind and compression by suffix, including plugins."""
    found: dict[str, tuple[str, Compression | None]] = {}
    for name, kind in INPUT_KINDS.load_all().items():
        for suffix in map(str.lower, kind.suffixes):
            found[suffix] = name, None
            found |= {suffix + end: (name, packed) for end, packed in PACKED.items() if packed in kind.compressions}
        found |= {suffix: (name, packed) for suffix, packed in kind.packed_suffixes.items()}
    return found


@functools.lru_cache(maxsize=4)
def _longest_first(names: tuple[str, ...]) -> list[tuple[str, tuple[str, Compression | None]]]:
    """Suffixes with kind and compression, the longest first; ``names`` of all kinds is the key of the cache."""
    return sorted(suffixes().items(), key=lambda pair: -len(pair[0]))


def readable() -> str:
    """Remedy for a file of no known kind."""
    kinds = INPUT_KINDS.load_all().values()
    ends = f"[{'|'.join(PACKED)}]"
    names = [suffix + (ends if kind.compressions else "") for kind in kinds for suffix in kind.suffixes]
    return f"name files that end in {', '.join(names)}"
