"""Parquet, one document per row: `--text-field`, `--id-field`."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import Any, NoReturn

from data_prep.errors import DataError
from data_prep.sources.inputs import EXTRA, Document, Fields, Part, Source
from data_prep.sources.kinds import InputKind
from data_prep.sources.records import BadRecord, Intake, decode, listed, text_remedy
from data_prep.sources.streams import check_size, open_checked

BATCH_BYTES = 16 << 20  # uncompressed bytes of one batch, by the mean row of its group
BATCH_ROWS = 4096
Text = bytes | None
Id = bytes | int | None


class Parquet(InputKind):
    """Parquet, one document per row. An offset is the row."""

    suffixes = (".parquet",)
    compressions = ()  # the format compresses its columns

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
        source, fields = part.source, intake.fields
        with open_checked(source, local) as file, _opened(source, file) as parquet:
            with _failures(source, file):
                schema = parquet.schema_arrow
            text_column, id_column = _columns(source, schema, fields)
            groups = range(parquet.metadata.num_row_groups)
            if not source.remote:
                groups = groups[part.begin : part.end]
            row = sum(parquet.metadata.row_group(i).num_rows for i in range(groups.start))
            for group in groups:
                for texts, ids in _batches(source, file, parquet, group, text_column, id_column):
                    for text, identity in zip(texts, ids):
                        document = _document(row, text, identity, intake)
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


def _document(row: int, text: Text, identity: Id, intake: Intake) -> Document | None:
    try:
        if text is None:
            raise BadRecord(f"null in column {intake.fields.text_field!r}; give every document a text")
        if isinstance(identity, bytes):
            name = decode(identity, 0, "byte of the id")
        else:
            name = "" if identity is None else str(identity)
        return intake.document(row, name, decode(text, 0, "byte of the text"))
    except BadRecord as problem:
        intake.reject(row, str(problem))
        return None


def _batches(
    source: Source, file: io.FileIO, parquet: Any, group: int, text_column: str, id_column: str | None
) -> Iterator[tuple[list[Text], list[Id]]]:
    """Yield (texts, ids) of a row group in batches of bounded bytes; strings as bytes, UTF-8 or not."""
    metadata = parquet.metadata.row_group(group)
    mean = max(1, metadata.total_byte_size // max(1, metadata.num_rows))
    rows = max(1, min(BATCH_ROWS, BATCH_BYTES // mean))
    columns = [text_column] if id_column in (None, text_column) else [text_column, id_column]
    with _failures(source, file):
        batches = parquet.iter_batches(rows, row_groups=[group], columns=columns, use_threads=False)
    found = 0
    while True:
        with _failures(source, file):
            batch = next(batches, None)
            if batch is None:
                break
            found += len(batch)
            texts: list[Text] = _cells(batch.column(text_column))
            ids: list[Id] = _cells(batch.column(id_column)) if id_column is not None else [None] * len(texts)
        yield texts, ids
    if found != metadata.num_rows:
        raise DataError(f"{source.path}: row group {group} has {found} rows, not {metadata.num_rows}; fetch it again")


def _cells(column: Any) -> list[Any]:
    """Values of an Arrow array. Parquet does not check that its strings are UTF-8, so they come as bytes."""
    import pyarrow as pa

    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if pa.types.is_large_string(column.type):
        column = column.cast(pa.large_binary())
    elif pa.types.is_string(column.type) or pa.types.is_string_view(column.type):
        column = column.cast(pa.binary())
    cells: list[Any] = column.to_pylist()
    return cells


def _columns(source: Source, schema: Any, fields: Fields) -> tuple[str, str | None]:
    """Names of the text column and of the id column, which may be None.

    Raises:
        DataError: no text column, or one of the two has the wrong type.
    """
    import pyarrow as pa

    def value_type(arrow: Any) -> Any:
        return arrow.value_type if pa.types.is_dictionary(arrow) else arrow

    def is_text(arrow: Any) -> bool:
        marked = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
        tests = (*marked, pa.types.is_binary, pa.types.is_large_binary)  # some writers do not mark text as such
        return any(test(value_type(arrow)) for test in tests)

    def is_id(arrow: Any) -> bool:
        return is_text(arrow) or pa.types.is_integer(value_type(arrow))

    types = {field.name: field.type for field in schema}
    for name in (fields.text_field, fields.id_field):
        if schema.names.count(name) > 1:
            raise DataError(f"{source.path}: {schema.names.count(name)} columns are called {name!r}; rename them")
    remedy = text_remedy(fields, {name: 0 for name, arrow in types.items() if is_text(arrow)})
    if fields.text_field not in types:
        raise DataError(f"{source.path}: no column {fields.text_field!r} among {listed(types)}; {remedy}")
    _demand(source, fields.text_field, types[fields.text_field], is_text, f"text; {remedy}")
    if fields.id_field not in types or pa.types.is_null(types[fields.id_field]):
        return fields.text_field, None
    _demand(source, fields.id_field, types[fields.id_field], is_id, "a string or an integer; choose another --id-field")
    return fields.text_field, fields.id_field


def _demand(source: Source, name: str, arrow: Any, test: Callable[..., bool], wanted: str) -> None:
    if not test(arrow):
        kind = " ".join(str(arrow).split())[:80]
        raise DataError(f"{source.path}: column {name!r} holds {kind}, not {wanted}")


@contextmanager
def _opened(source: Source, file: io.FileIO) -> Iterator[Any]:
    """Open a file as :class:`pyarrow.parquet.ParquetFile`."""
    try:
        import pyarrow.parquet as pq
    except ImportError:
        raise DataError(f"{source.path}: pyarrow is needed for Parquet and is not installed; {EXTRA}") from None
    with _failures(source, file):
        # Reads pages as they are needed, not whole columns, and checks their checksums if there are any.
        parquet = pq.ParquetFile(file, buffer_size=1 << 20, pre_buffer=False, page_checksum_verification=True)
    with parquet:
        yield parquet


@contextmanager
def _failures(source: Source, file: io.FileIO) -> Iterator[None]:
    """Raise DataError for every exception of pyarrow."""
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, OSError, EOFError, ValueError) as error:  # many of its own errors are ValueErrors
        _broken(source, file, error)


def _broken(source: Source, file: io.FileIO, error: Exception) -> NoReturn:
    check_size(source, file)
    raise DataError(
        f"{source.path}: cut or corrupt Parquet ({' '.join(str(error).split())[:200]}); fetch the file again"
    ) from None
