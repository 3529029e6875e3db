"""Documents of JSONL and of plain text."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from data_prep.sources import records
from data_prep.sources.kinds import Document, Part
from data_prep.sources.records import BOM, BadRecord, Intake, decode, id_of, parse_object, text_of, too_big
from data_prep.sources.streams import WHOLE, open_stream, read_lines


def read_jsonl(part: Part, local: Path, intake: Intake) -> Iterator[Document]:
    """One JSON object on each line; lines of white space are passed over. See :func:`data_prep.sources.read_part`."""
    fields = intake.fields
    for offset, line, at in _lines(part, local, intake):
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


def read_text(part: Part, local: Path, intake: Intake) -> Iterator[Document]:
    """Each line that is not blank, or the whole file, is a document. See :func:`data_prep.sources.read_part`."""
    if intake.fields.text_documents == "file":
        if part.begin == 0:  # the only part in which the document starts
            yield from _whole_file(part, local, intake)
        return
    for offset, line, at in _lines(part, local, intake):
        try:
            text = decode(line, at).rstrip("\r\n")
            document = intake.document(offset, "", text) if text.strip() else None
        except BadRecord as problem:
            intake.reject(offset, str(problem))
            continue
        if document is not None:
            yield document


def _lines(part: Part, local: Path, intake: Intake) -> Iterator[tuple[int, bytes, int]]:
    """(offset, line, byte at which what is left of it begins) without a BOM; lines that are too long are rejected."""
    source = part.source
    end = part.end if source.compression is None else WHOLE
    with open_stream(source, local, max(0, part.begin - 1)) as stream:
        for offset, line in read_lines(stream, part.begin, end, records.MAX_LINE):
            if line is None:
                intake.reject(offset, too_big(records.MAX_LINE, "line", at_least=True))
            elif offset == 0 and line.startswith(BOM):
                yield offset, line[len(BOM) :], len(BOM)
            else:
                yield offset, line, offset


def _whole_file(part: Part, local: Path, intake: Intake) -> Iterator[Document]:
    with open_stream(part.source, local) as stream:
        data = stream.read(records.MAX_DOCUMENT + len(BOM) + 1)
        bom = len(BOM) if data.startswith(BOM) else 0
        size = len(data) - bom
        if size > records.MAX_DOCUMENT:
            while stream.read(1 << 20):  # the rest may be damaged, which must not go unseen
                pass
    try:
        if size > records.MAX_DOCUMENT:
            reason = too_big(records.MAX_DOCUMENT, "file", at_least=True)
            raise BadRecord(f"{reason}, or use --text-documents line")
        document = intake.document(0, "", decode(data[bom:], bom))
    except BadRecord as problem:
        intake.reject(0, str(problem))
    else:
        if document is not None:
            yield document
