"""JSON objects, one per line: `--text-field`, `--id-field`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from data_prep.sources.inputs import Document, Part, Source
from data_prep.sources.kinds import InputKind
from data_prep.sources.lines import line_parts, part_lines
from data_prep.sources.records import BadRecord, Intake, id_of, parse_object, text_of


class JsonLines(InputKind):
    """JSON objects, one per line; blank lines are skipped. An offset is the byte of the line."""

    suffixes = (".jsonl",)

    def parts(self, source: Source, target_bytes: int) -> list[Part]:
        """Byte ranges of lines."""
        return line_parts(source, target_bytes)

    def read(self, part: Part, local: Path, intake: Intake) -> Iterator[Document]:
        """Yield one document per line."""
        fields = intake.fields
        for offset, line, at in part_lines(part, local, intake):
            if not line.strip():
                continue
            try:
                record = parse_object(line.rstrip(b"\r\n"), at, fields.text_field)
                document = intake.document(offset, id_of(record, fields), text_of(record, fields))
            except BadRecord as problem:
                intake.reject(offset, str(problem))
                continue
            if document is not None:
                yield document
