"""Documents from the columns of tables, for Parquet and Arrow files."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, NoReturn

from data_prep.errors import DataError
from data_prep.sources.inputs import EXTRA, Document, Fields, Source
from data_prep.sources.records import BadRecord, Intake, decode, listed, scalar_id, text_remedy
from data_prep.sources.streams import check_size

BATCH_BYTES = 16 << 20  # uncompressed bytes of one batch, by the mean row
BATCH_ROWS = 4096
_DEEPEST = 4  # levels of fields that a message suggests


class Columns(NamedTuple):
    """Paths of the text column and the id column: a column, then fields of its structs. There may be no ids."""

    text: tuple[str, ...]
    identity: tuple[str, ...] | None

    @property
    def names(self) -> list[str]:
        """Columns as Parquet selects them, ``a.b`` for a field of a struct."""
        paths = [self.text] if self.identity in (None, self.text) else [self.text, self.identity]
        return [".".join(path) for path in paths if path is not None]

    def rows(self, batch: Any) -> Iterator[tuple[Any, Any]]:
        """Yield (text, id) of each row of a record batch, strings as bytes, UTF-8 or not.

        Raises:
            pyarrow.ArrowInvalid: the arrays do not fit their buffers.
        """
        texts = _cells(_column(batch, self.text))
        ids = [None] * len(texts) if self.identity is None else _cells(_column(batch, self.identity))
        yield from zip(texts, ids)


def document_of(row: int, text: bytes | None, identity: Any, intake: Intake) -> Document | None:
    """The document of one row, or None after rejecting or skipping it."""
    try:
        if text is None:
            raise BadRecord(f"null in column {intake.fields.text_field!r}; give every document a text")
        if isinstance(identity, bytes):
            name = decode(identity, 0, "byte of the id")
        else:
            name = "" if identity is None else scalar_id(identity)
        return intake.document(row, name, decode(text, 0, "byte of the text"))
    except BadRecord as problem:
        intake.reject(row, str(problem))
        return None


def find_columns(source: Source, schema: Any, fields: Fields) -> Columns:
    """Find the columns of text and id in an Arrow schema; ``a.b`` is a column of that name, or field b of struct a.

    Raises:
        DataError: no text column, or one of the two has the wrong type.
    """
    import pyarrow as pa

    for name in (fields.text_field, fields.id_field):
        if schema.names.count(name) > 1:
            raise DataError(f"{source.path}: {schema.names.count(name)} columns are called {name!r}; rename them")
    types = dict(_leaves(schema))
    remedy = text_remedy(fields, {".".join(path): 0 for path, arrow in types.items() if _is_text(arrow)})
    text = _path(schema, fields.text_field)
    if text is None:
        raise DataError(f"{source.path}: no column {fields.text_field!r} among {listed(schema.names)}; {remedy}")
    _demand(source, fields.text_field, _type_at(schema, text), _is_text, f"text; {remedy}")
    identity = _path(schema, fields.id_field)
    if identity is None or pa.types.is_null(_type_at(schema, identity)):
        return Columns(text, None)
    wanted = "a string, a number or another scalar; choose another --id-field"
    _demand(source, fields.id_field, _type_at(schema, identity), _is_scalar, wanted)
    return Columns(text, identity)


def _leaves(schema: Any) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Paths and types of columns and of the fields of their structs."""
    import pyarrow as pa

    waiting: list[tuple[tuple[str, ...], Any]] = [((field.name,), field.type) for field in schema]
    while waiting:
        path, arrow = waiting.pop(0)
        if pa.types.is_struct(arrow) and len(path) < _DEEPEST:
            waiting += [((*path, field.name), field.type) for field in arrow]
        else:
            yield path, arrow


def _path(schema: Any, field: str) -> tuple[str, ...] | None:
    """Path of a field, in whose names there may be dots; None if there is none."""
    return (field,) if field in schema.names else _below(list(schema), field)


def _below(fields: list[Any], rest: str) -> tuple[str, ...] | None:
    """Path of ``rest`` from a list of Arrow fields on; of two with one name neither is meant."""
    import pyarrow as pa

    often = Counter(field.name for field in fields)
    for field in fields:
        if often[field.name] > 1:
            continue
        if field.name == rest:
            return (rest,)
        if rest.startswith(f"{field.name}.") and pa.types.is_struct(field.type):
            inner = _below(list(field.type), rest[len(field.name) + 1 :])
            if inner is not None:
                return (field.name, *inner)
    return None


def _type_at(schema: Any, path: tuple[str, ...]) -> Any:
    arrow = schema.field(path[0]).type
    for name in path[1:]:
        arrow = arrow.field(name).type
    return arrow


def _is_text(arrow: Any) -> bool:
    import pyarrow as pa

    arrow = arrow.value_type if pa.types.is_dictionary(arrow) else arrow
    marked = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
    tests = (*marked, pa.types.is_binary, pa.types.is_large_binary)  # some writers do not mark text as such
    return any(test(arrow) for test in tests)


def _is_scalar(arrow: Any) -> bool:
    import pyarrow as pa

    arrow = arrow.value_type if pa.types.is_dictionary(arrow) else arrow
    return not pa.types.is_nested(arrow) and not isinstance(arrow, pa.BaseExtensionType)


def _demand(source: Source, name: str, arrow: Any, test: Callable[..., bool], wanted: str) -> None:
    if not test(arrow):
        kind = " ".join(str(arrow).split())[:80]
        raise DataError(f"{source.path}: column {name!r} holds {kind}, not {wanted}")


def _column(batch: Any, path: tuple[str, ...]) -> Any:
    """The array at ``path``; a row whose struct is null is null."""
    import pyarrow.compute as pc

    column = batch.column(path[0])
    return pc.struct_field(column, list(path[1:])) if path[1:] else column


def _cells(column: Any) -> list[Any]:
    """Values of an Arrow array. Nobody has checked that its strings are UTF-8, so they come as bytes."""
    import pyarrow as pa

    if pa.types.is_dictionary(column.type):
        values = _as_binary(column.dictionary)
        values.validate(full=True)
        column = pa.DictionaryArray.from_arrays(column.indices, values, safe=True).dictionary_decode()
    column = _as_binary(column)
    column.validate(full=True)
    cells: list[Any]
    try:
        cells = column.to_pylist()
    except (pa.ArrowException, ValueError, ArithmeticError, LookupError):
        if not pa.types.is_temporal(column.type):
            raise
        # A time that Python's has no place for: nanoseconds, the year 10000, an unknown time zone. An id is a name.
        cells = column.view(pa.int64() if column.type.bit_width == 64 else pa.int32()).to_pylist()
    return cells


def _as_binary(column: Any) -> Any:
    import pyarrow as pa

    if pa.types.is_large_string(column.type):
        return column.view(pa.large_binary())
    if pa.types.is_string(column.type):
        return column.view(pa.binary())
    return column.cast(pa.binary()) if pa.types.is_string_view(column.type) else column


@contextmanager
def failures(source: Source, file: io.FileIO, what: str) -> Iterator[None]:
    """Raise DataError for every exception of pyarrow; ``what`` names the format."""
    import pyarrow as pa

    try:
        yield
    except DataError:
        raise
    except (pa.ArrowException, OSError, EOFError, ValueError, ArithmeticError, LookupError, MemoryError) as error:
        broken(source, file, what, error)


def broken(source: Source, file: io.FileIO, what: str, error: Exception) -> NoReturn:
    """Raise the DataError of a file that pyarrow cannot read."""
    check_size(source, file)
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    raise DataError(f"{source.path}: cut or corrupt {what} ({reason}); fetch the file again") from None


def missing_pyarrow(source: Source, what: str) -> DataError:
    """The error of a missing pyarrow."""
    return DataError(f"{source.path}: pyarrow is needed for {what} and is not installed; {EXTRA}")
