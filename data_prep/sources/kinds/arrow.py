"""Arrow and Feather files, and folders of Hugging Face datasets: one document per row."""

from __future__ import annotations

import io
from collections.abc import Iterator, Set
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from bd3_common.schema import InnerPath, OpenRecord, read
from data_prep.errors import DataError
from data_prep.sources.columns import (
    BATCH_BYTES,
    BATCH_ROWS,
    document_of,
    failures,
    find_columns,
    missing_pyarrow,
)
from data_prep.sources.inputs import Document, Part, Source
from data_prep.sources.kinds import FolderContent, InputKind
from data_prep.sources.records import Intake
from data_prep.sources.streams import check_size, open_checked

WHAT = "Arrow"
FILE_FORMAT = b"ARROW1"
STREAM_END = b"\xff\xff\xff\xff\0\0\0\0"
STATE, INFO, DICT = "state.json", "dataset_info.json", "dataset_dict.json"
REMEDY = "save it again with datasets.save_to_disk"


class _File(OpenRecord):
    filename: InnerPath


class _State(OpenRecord):
    """``state.json`` of a dataset."""

    data_files: Annotated[list[_File], Field(alias="_data_files")]
    indices: Annotated[list[_File] | None, Field(alias="_indices_data_files")] = None


class _Splits(OpenRecord):
    """``dataset_dict.json`` of a DatasetDict."""

    splits: list[InnerPath]


class Arrow(InputKind):
    """Arrow files (the stream format and the file format, which is Feather's), one document per row.

    An offset is the row. A file is one part. Only pyarrow reads; nothing that a file or folder names is executed.
    """

    suffixes = (".arrow", ".feather")
    compressions = ()  # the format compresses its buffers
    magic = FILE_FORMAT

    def content_of(self, folder: Path, names: Set[str]) -> FolderContent | None:
        """The files of a folder of ``datasets``: of one dataset, of a DatasetDict (all its splits), or of its cache."""
        if DICT in names:
            splits = read(folder / DICT, _Splits, REMEDY, DataError).splits
            listed = ", ".join(splits)
            note = f"{folder}: a DatasetDict; all its splits ({listed}) are read; to read one, name its folder"
            return FolderContent(tuple(folder / name for name in splits), {DICT}, note)
        if {STATE, INFO} <= names:
            state = read(folder / STATE, _State, REMEDY, DataError)
            if state.indices:
                raise DataError(f"{folder}: its rows are chosen by an indices file, which is not read; {REMEDY}")
            return FolderContent(tuple(folder / file.filename for file in state.data_files), {STATE, INFO})
        if INFO in names and any(name.endswith(".arrow") for name in names):
            # Its cache-*.arrow are results of map and filter: the same documents again.
            data = sorted(name for name in names if name.endswith(".arrow") and not name.startswith("cache-"))
            return FolderContent(tuple(folder / name for name in data), {INFO})
        return None

    def stored_before(self, source: Source, local: Path, offset: int) -> float:
        """Stored bytes in proportion to the rows."""
        with open_checked(source, local) as file:
            rows = sum(len(batch) for batch in _batches(source, file, None))
        return float(source.bytes * (offset + 1) / max(1, rows))

    def read(self, part: Part, local: Path, intake: Intake) -> Iterator[Document]:
        """Yield one document per row."""
        source = part.source
        with open_checked(source, local) as file:
            with failures(source, file, WHAT):
                schema = _open(source, file, None).schema
                columns = find_columns(source, schema, intake.fields)
                paths = [columns.text] if columns.identity is None else [columns.text, columns.identity]
                fields = sorted({schema.get_field_index(path[0]) for path in paths})
            row = 0
            for batch in _batches(source, file, fields):
                with failures(source, file, WHAT):
                    batch.validate()
                    mean = max(1, batch.get_total_buffer_size() // max(1, len(batch)))
                step = max(1, min(BATCH_ROWS, BATCH_BYTES // mean))
                for begin in range(0, len(batch), step):
                    with failures(source, file, WHAT):
                        rows = list(columns.rows(batch.slice(begin, step)))
                    for text, identity in rows:
                        document = document_of(row, text, identity, intake)
                        row += 1
                        if document is not None:
                            yield document


def _batches(source: Source, file: io.FileIO, fields: list[int] | None) -> Iterator[Any]:
    """Yield the record batches of a file, with the columns of these numbers only."""
    with failures(source, file, WHAT):
        reader = _open(source, file, fields)
        count = getattr(reader, "num_record_batches", None)
    number = 0
    while count is None or number < count:
        with failures(source, file, WHAT):
            try:
                batch = reader.read_next_batch() if count is None else reader.get_batch(number)
            except StopIteration:
                break
        number += 1
        yield batch
    check_size(source, file)


def _open(source: Source, file: io.FileIO, fields: list[int] | None) -> Any:
    """A reader of the file format or the stream format.

    Raises:
        DataError: pyarrow is missing, or the stream does not end as it must: pyarrow takes a cut for the end.
    """
    try:
        import pyarrow as pa
    except ImportError:
        raise missing_pyarrow(source, WHAT) from None
    options = pa.ipc.IpcReadOptions(included_fields=fields, use_threads=False)
    file.seek(0)
    head = file.read(len(FILE_FORMAT))
    if head == FILE_FORMAT:
        return pa.ipc.open_file(_Bounded(file, source.bytes), options=options)
    if head.startswith(b"FEA1"):
        raise DataError(f"{source.path}: Feather of version 1, which is not read; write it as version 2 or Parquet")
    file.seek(max(0, source.bytes - len(STREAM_END)))
    if file.read(len(STREAM_END)) != STREAM_END:
        check_size(source, file)
        raise DataError(f"{source.path}: cut or corrupt Arrow (no end of the stream); fetch the file again")
    file.seek(0)
    return pa.ipc.open_stream(_Bounded(file, source.bytes), options=options)


class _Bounded(io.RawIOBase):
    """A file whose reads ask for no more than it has: a damaged length must not reserve memory."""

    def __init__(self, file: io.FileIO, size: int):
        self._file, self._size = file, size

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def read(self, count: int = -1, /) -> bytes:
        rest = max(0, self._size - self._file.tell())
        wanted = rest if count < 0 else min(count, rest)
        data = self._file.read(wanted)
        while len(data) < wanted and (more := self._file.read(wanted - len(data))):  # 2 GiB at most at once
            data += more
        return data
