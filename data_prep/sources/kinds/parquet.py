"""Parquet, one document per row: `--text-field`, `--id-field`."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import Any

from data_prep.errors import DataError
from data_prep.sources.columns import (
    BATCH_BYTES,
    BATCH_ROWS,
    Columns,
    document_of,
    failures,
    find_columns,
    missing_pyarrow,
)
from data_prep.sources.inputs import Document, Part, Source
from data_prep.sources.kinds import InputKind
from data_prep.sources.records import Intake
from data_prep.sources.streams import open_checked

WHAT = "Parquet"


class Parquet(InputKind):
    """Parquet, one document per row. An offset is the row."""

    suffixes = (".parquet", ".pq", ".parq")
    compressions = ()  # the format compresses its columns
    magic = b"PAR1"

    def parts(self, source: Source, target_bytes: int) -> list[Part]:
        """Consecutive row groups up to the target, from the footer; a remote file is one part.

        A group's share of the stored bytes is taken from its uncompressed size.

        Raises:
            DataError: the footer cannot be read, or pyarrow is missing.
        """
        if source.remote:
            return [Part(source, 0, source.bytes)]
        edges = [0, *accumulate(group_sizes(source, Path(source.path)))]
        stored = [source.bytes * edge // (edges[-1] or 1) for edge in edges]
        parts, begin, last = [], 0, len(edges) - 1
        for end in range(1, last + 1):
            if stored[end] - stored[begin] >= target_bytes or end == last:
                parts.append(Part(source, begin, end, stored=stored[end] - stored[begin]))
                begin = end
        return parts or [Part(source, 0, 0, stored=source.bytes)]

    def stored_before(self, source: Source, local: Path, offset: int) -> float:
        """Stored bytes in proportion to the rows."""
        import pyarrow.parquet

        return float(source.bytes * (offset + 1) / pyarrow.parquet.read_metadata(local).num_rows)

    def read(self, part: Part, local: Path, intake: Intake) -> Iterator[Document]:
        """Yield one document per row."""
        source = part.source
        with open_checked(source, local) as file, _opened(source, file) as parquet:
            with failures(source, file, WHAT):
                columns = find_columns(source, parquet.schema_arrow, intake.fields)
            groups = range(parquet.metadata.num_row_groups)
            if not source.remote:
                groups = groups[part.begin : part.end]
            row = sum(parquet.metadata.row_group(i).num_rows for i in range(groups.start))
            for group in groups:
                for rows in _batches(source, file, parquet, group, columns):
                    for text, identity in rows:
                        document = document_of(row, text, identity, intake)
                        row += 1
                        if document is not None:
                            yield document


def group_sizes(source: Source, local: Path) -> list[int]:
    """Uncompressed bytes of each row group, from the footer alone.

    Raises:
        DataError: the file cannot be opened, is cut or is not Parquet.
    """
    with open_checked(source, local) as file, _opened(source, file) as parquet:
        # Not the compressed sizes of the columns: reading those of a damaged column aborts the process (pyarrow 26).
        groups = map(parquet.metadata.row_group, range(parquet.metadata.num_row_groups))
        return [max(0, group.total_byte_size) for group in groups]


def _batches(
    source: Source, file: io.FileIO, parquet: Any, group: int, columns: Columns
) -> Iterator[list[tuple[Any, Any]]]:
    """Yield (text, id) of the rows of a row group in batches of bounded bytes."""
    metadata = parquet.metadata.row_group(group)
    mean = max(1, metadata.total_byte_size // max(1, metadata.num_rows))
    rows = max(1, min(BATCH_ROWS, BATCH_BYTES // mean))
    with failures(source, file, WHAT):
        batches = parquet.iter_batches(rows, row_groups=[group], columns=columns.names, use_threads=False)
    found = 0
    while True:
        with failures(source, file, WHAT):
            batch = next(batches, None)
            if batch is None:
                break
            found += len(batch)
            cells = list(columns.rows(batch))
        yield cells
    if found != metadata.num_rows:
        raise DataError(f"{source.path}: row group {group} has {found} rows, not {metadata.num_rows}; fetch it again")


@contextmanager
def _opened(source: Source, file: io.FileIO) -> Iterator[Any]:
    """Open a file as :class:`pyarrow.parquet.ParquetFile`."""
    try:
        import pyarrow.parquet as pq
    except ImportError:
        raise missing_pyarrow(source, WHAT) from None
    with failures(source, file, WHAT):
        # Reads pages as they are needed, not whole columns, and checks their checksums if there are any.
        parquet = pq.ParquetFile(file, buffer_size=1 << 20, pre_buffer=False, page_checksum_verification=True)
    with parquet:
        yield parquet
