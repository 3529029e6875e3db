"""Files of lines: splitting by size, reading line by line."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

from data_prep.errors import DataError
from data_prep.sources import records
from data_prep.sources.inputs import Part, Source
from data_prep.sources.records import BOM, Intake, too_big, wide_encoding, wide_remedy
from data_prep.sources.streams import WHOLE, open_stream, read_head, read_lines

HEAD = 64 << 10  # bytes that tell the encoding and the layout of a text file


def line_parts(source: Source, target_bytes: int) -> list[Part]:
    """Parts of about ``target_bytes``: the lines that start in a byte range. A compressed file is one part."""
    if source.compression is not None:
        return [Part(source, 0, source.bytes)]
    count = max(1, round(source.bytes / target_bytes))
    edges = [source.bytes * i // count for i in range(count + 1)]
    return [Part(source, begin, end) for begin, end in pairwise(edges)]


def part_lines(part: Part, local: Path, intake: Intake, head: bytes | None = None) -> Iterator[tuple[int, bytes, int]]:
    """Yield (offset, line without a BOM, offset after the BOM); lines that are too long are rejected.

    Args:
        head: the first bytes of the file, if they have been read.

    Raises:
        DataError: the file is damaged, or its text is UTF-16 or UTF-32.
    """
    source = part.source
    if part.begin == 0:
        check_encoding(source, read_head(source, local, HEAD) if head is None else head)
    end = part.end if source.compression is None else WHOLE
    with open_stream(source, local, max(0, part.begin - 1)) as stream:
        for offset, line in read_lines(stream, part.begin, end, records.MAX_LINE):
            if line is None:
                intake.reject(offset, too_big(records.MAX_LINE, "line", at_least=True))
            elif offset == 0 and line.startswith(BOM):
                yield offset, line[len(BOM) :], len(BOM)
            else:
                yield offset, line, offset


def check_encoding(source: Source, head: bytes) -> None:
    """Raise DataError if a text file that begins with ``head`` is UTF-16 or UTF-32."""
    encoding = wide_encoding(head)
    if encoding is not None:
        raise DataError(f"{source.path}: {wide_remedy(encoding)}")
