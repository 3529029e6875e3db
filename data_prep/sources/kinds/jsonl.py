"""JSON: one object per line, one array of objects, or objects that span lines: `--text-field`, `--id-field`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from data_prep.errors import DataError
from data_prep.sources import records
from data_prep.sources.inputs import Document, Part, Source
from data_prep.sources.json_values import JsonValues, Layout, layout_of
from data_prep.sources.kinds import InputKind
from data_prep.sources.lines import HEAD, check_encoding, line_parts, part_lines
from data_prep.sources.records import BadRecord, Intake, id_of, parse_object, text_of, too_big
from data_prep.sources.streams import open_stream, read_head


class JsonLines(InputKind):
    """JSON objects, one per line, in one array, or spanning lines. An offset is the byte of the object.

    The beginning of the file tells the layout. Blank lines are skipped. In a file of lines a bad line is one bad
    record; damage to the structure of an array is an error.
    """

    suffixes = (".jsonl", ".json", ".ndjson")

    def parts(self, source: Source, target_bytes: int) -> list[Part]:
        """Byte ranges of lines; any other layout is one part."""
        parts = line_parts(source, target_bytes)
        if len(parts) > 1 and layout_of(read_head(source, Path(source.path), HEAD)) != "lines":
            return [Part(source, 0, source.bytes)]
        return parts

    def read(self, part: Part, local: Path, intake: Intake) -> Iterator[Document]:
        """Yield one document per object."""
        fields = intake.fields
        for offset, data, at in _objects(part, local, intake):
            if b"\0" in data:
                data = intake.without_nul(data)
            if not data.strip():
                continue
            try:
                record = parse_object(data.rstrip(b"\r\n"), at, fields.text_field)
                document = intake.document(offset, id_of(record, fields), text_of(record, fields))
            except BadRecord as problem:
                intake.reject(offset, str(problem))
                continue
            if document is not None:
                yield document


def _objects(part: Part, local: Path, intake: Intake) -> Iterator[tuple[int, bytes, int]]:
    """Yield (offset, JSON, offset of the JSON) of what must be objects."""
    source = part.source
    layout: Layout = "lines"
    head = b""
    if part.begin == 0:
        head = read_head(source, local, HEAD)
        check_encoding(source, head)
        layout = layout_of(head)
    if layout == "lines":
        yield from part_lines(part, local, intake, head)
        return
    if part.end < source.bytes:
        raise DataError(f"{source.path}: changed since it was listed; run again once it is complete")
    with open_stream(source, local) as stream:
        for offset, data in JsonValues(stream, source.path, layout == "array", records.MAX_LINE):
            if data is None:
                intake.reject(offset, too_big(records.MAX_LINE, "JSON value", at_least=True))
            else:
                yield offset, data, offset
