"""Megatron's token files, a `.bin` with its `.idx`: documents of token ids, which are not tokenized again."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.errors import DataError
from data_prep.sources.inputs import Part, Source, TokenDocument
from data_prep.sources.kinds import InputKind
from data_prep.sources.records import MAX_DOCUMENT, Intake, too_big

HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype, sequences, document ends
MAGIC = b"MMIDIDX\x00\x00"
DTYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}  # by the code in the header; not floats
READ_BYTES = 4 << 20


class Megatron(InputKind):
    """Token files of Megatron's preprocessing, read with megatron-core. An offset is the number of the document.

    A document ends where the ``.idx`` has its end, and may have several sequences. A part is a range of documents.
    """

    suffixes = (".bin",)
    compressions = ()
    partner = ".idx"
    holds_tokens = True

    def parts(self, source: Source, target_bytes: int) -> list[Part]:
        """Ranges of documents.

        Raises:
            DataError: the pair is damaged.
        """
        index = read_index(source, Path(source.path))
        count = max(1, min(index.documents, round(index.bin_bytes / target_bytes)))
        starts = index.starts
        wanted = [index.bin_bytes * n // count for n in range(1, count)]
        edges = sorted({0, *np.searchsorted(starts, wanted).tolist(), index.documents})
        if len(edges) == 1:
            return [Part(source, 0, 0, stored=source.bytes)]
        places = [int(starts[edge]) * source.bytes // max(1, index.bin_bytes) for edge in edges[:-1]] + [source.bytes]
        return [
            Part(source, begin, end, stored=places[n + 1] - places[n]) for n, (begin, end) in enumerate(pairwise(edges))
        ]

    def stored_before(self, source: Source, local: Path, offset: int) -> float:
        """Bytes of the tokens before the document after this one."""
        index = read_index(source, local)
        end = index.starts[offset + 1] if offset + 1 < index.documents else index.bin_bytes
        return float(max(1, source.bytes * int(end) // max(1, index.bin_bytes)))

    def read(self, part: Part, local: Path, intake: Intake) -> Iterator[TokenDocument]:
        """Yield the documents of a range."""
        source = part.source
        index = read_index(source, local)
        itemsize = np.dtype(index.dtype).itemsize
        end = min(part.end, index.documents)
        if part.begin >= end:
            return
        tokens = _open(source, local)
        begin = part.begin
        while begin < end:
            # Several documents at once: each read opens the file.
            later = index.starts[begin + 1 : end]
            stop = begin + 1 + int(np.searchsorted(later, index.starts[begin] + READ_BYTES))
            edges = np.append(index.starts[begin:stop], index.end_of(stop - 1)) // itemsize
            edges -= edges[0]
            if stop == begin + 1 and int(edges[1]) * itemsize > MAX_DOCUMENT:
                intake.reject(begin, too_big(int(edges[1]) * itemsize, "document"))
            else:
                ids = _read(source, tokens, int(index.bounds[begin]), int(index.bounds[stop]))
                if len(ids) != edges[-1]:
                    raise _damaged(source, f"documents {begin} to {stop - 1} have {len(ids)} tokens, not {edges[-1]}")
                for number in range(stop - begin):
                    document = intake.tokens(begin + number, "", ids[edges[number] : edges[number + 1]])
                    if document is not None:
                        yield document
            begin = stop
        if index != read_index(source, local):
            raise DataError(f"{source.path}: changed while it was read; run again once it is complete")


@dataclass(frozen=True, eq=False)
class Index:
    """Contents of an ``.idx``."""

    dtype: str
    bin_bytes: int
    bounds: np.ndarray  # [documents + 1]: first sequence of each document, and the number of sequences
    starts: np.ndarray  # [documents]: first byte of each document in the .bin

    @property
    def documents(self) -> int:
        return len(self.starts)

    def end_of(self, document: int) -> int:
        """Byte behind a document."""
        return int(self.starts[document + 1]) if document + 1 < self.documents else self.bin_bytes

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Index)
            and (self.dtype, self.bin_bytes) == (other.dtype, other.bin_bytes)
            and np.array_equal(self.bounds, other.bounds)
            and np.array_equal(self.starts, other.starts)
        )


def read_index(source: Source, local: Path) -> Index:
    """Read and check the ``.idx`` beside ``local``: megatron-core trusts it.

    Raises:
        DataError: a file is missing, cut or damaged, or the two do not belong to each other.
    """
    path = partner_of(local)
    try:
        size, bin_bytes = path.stat().st_size, local.stat().st_size
        with path.open("rb") as file:
            head = file.read(HEADER.size)
            if len(head) < HEADER.size or not head.startswith(MAGIC):
                raise _damaged(source, f"{path.name} is not an index of Megatron's")
            _, version, code, sequences, ends = HEADER.unpack(head)
            if version != 1 or code not in DTYPES:
                raise _damaged(source, f"{path.name} has version {version} and type {code}, which are no token ids")
            table = HEADER.size + sequences * 12 + ends * 8
            if size not in (table, table + sequences):  # modes of multimodal data may follow
                raise _damaged(source, f"{path.name} has {size} bytes and its header asks for {table}")
            lengths = np.fromfile(file, "<i4", sequences)
            pointers = np.fromfile(file, "<i8", sequences)
            bounds = np.fromfile(file, "<i8", ends)
    except OSError as error:
        raise DataError(f"{source.path}: cannot be read ({path.name}: {error.strerror}); give both files") from None
    if size + bin_bytes != source.bytes:
        raise DataError(
            f"{source.path}: has {size + bin_bytes} bytes now, with its {path.name}, and had {source.bytes} when it "
            "was listed; run again once it is complete"
        )
    if not ends:
        bounds = np.zeros(1, "<i8")
    if bounds[0] != 0 or bounds[-1] != sequences or (np.diff(bounds) < 0).any():
        raise _damaged(source, f"{path.name} has document ends that are not in order, or not those of its sequences")
    places = np.append(0, np.cumsum(lengths, dtype=np.int64)) * np.dtype(DTYPES[code]).itemsize
    if (lengths < 0).any() or (pointers != places[:-1]).any() or places[-1] != bin_bytes:
        raise _damaged(source, f"{path.name} speaks of {places[-1]} bytes of tokens, the .bin has {bin_bytes}")
    return Index(DTYPES[code], bin_bytes, bounds, places[bounds[:-1]])


def partner_of(path: Path) -> Path:
    """The ``.idx`` of a ``.bin``, in letters of the same case."""
    return path.with_suffix(".IDX" if path.suffix.isupper() else Megatron.partner)


def _open(source: Source, local: Path) -> Any:
    """The files as megatron-core's IndexedDataset, without mapping the tokens into memory: a cut would kill us."""
    try:
        from megatron.core.datasets.indexed_dataset import IndexedDataset
    except ImportError:
        raise DataError(
            f"{source.path}: megatron-core is needed for .bin and .idx and is not installed; pip install megatron-core"
        ) from None
    if local.suffix != ".bin":
        raise DataError(f"{source.path}: megatron-core reads names in small letters only; rename both files")
    return IndexedDataset(str(local.with_suffix("")), multimodal=False, mmap=False)


def _read(source: Source, tokens: Any, begin: int, end: int) -> np.ndarray:
    """Ids ``[n]`` of consecutive sequences."""
    try:
        found = tokens[begin:end] if end > begin else []
    except (OSError, ValueError) as error:
        raise _damaged(source, " ".join(str(error).split())) from None
    return np.concatenate(found) if found else np.zeros(0, tokens.index.dtype)


def _damaged(source: Source, what: str) -> DataError:
    return DataError(f"{source.path}: cut or damaged ({what}); fetch both files again")
