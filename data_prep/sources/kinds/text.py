"""Plain text: a document per line, or per file with `--text-documents file`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from data_prep.sources import records
from data_prep.sources.inputs import Document, Part, Source
from data_prep.sources.kinds import InputKind
from data_prep.sources.lines import line_parts, part_lines
from data_prep.sources.records import BOM, BadRecord, Intake, decode, decode_file, too_big
from data_prep.sources.streams import open_stream


class Text(InputKind):
    """Plain text, a document per line or per file. An offset is the byte of the line."""

    suffixes = (".txt",)

    def parts(self, source: Source, target_bytes: int) -> list[Part]:
        """Byte ranges of lines."""
        return line_parts(source, target_bytes)

    def read(self, part: Part, local: Path, intake: Intake) -> Iterator[Document]:
        """Yield one document per line that is not blank, or one for the file."""
        if intake.fields.text_documents == "file":
            if part.begin == 0:  # the only part in which the document starts
                yield from _whole_file(part, local, intake)
            return
        for offset, line, at in part_lines(part, local, intake):
            try:
                text = decode(line, at).rstrip("\r\n")
                document = intake.document(offset, "", text) if text.strip() else None
            except BadRecord as problem:
                intake.reject(offset, str(problem))
                continue
            if document is not None:
                yield document


def _whole_file(part: Part, local: Path, intake: Intake) -> Iterator[Document]:
    with open_stream(part.source, local) as stream:
        data = stream.read(records.MAX_DOCUMENT + len(BOM) + 1)
        bom = len(BOM) if data.startswith(BOM) else 0
        size = len(data) - bom
        if size > records.MAX_DOCUMENT:
            while stream.read(1 << 20):  # the rest may be damaged, which must raise
                pass
    try:
        if size > records.MAX_DOCUMENT:
            reason = too_big(records.MAX_DOCUMENT, "file", at_least=True)
            raise BadRecord(f"{reason}, or use --text-documents line")
        document = intake.document(0, "", decode_file(data, 0))
    except BadRecord as problem:
        intake.reject(0, str(problem))
    else:
        if document is not None:
            yield document
