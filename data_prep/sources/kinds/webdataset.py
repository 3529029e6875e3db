"""WebDataset tars, one document per sample: its `.txt` member, or the fields of its `.json` member."""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.errors import DataError
from data_prep.sources import records
from data_prep.sources.inputs import EXTRA, Document, Part
from data_prep.sources.kinds import InputKind
from data_prep.sources.records import BOM, BadRecord, Intake, decode, encodable, id_of, parse_object, text_of, too_big
from data_prep.sources.streams import open_stream
from data_prep.sources.tar import TarMembers

NAME = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]*)", re.DOTALL)  # key, then all extensions; no hidden files
TEXTS = ("txt", "json")


class WebDataset(InputKind):
    """WebDataset tars of text. Consecutive members with one key are one sample. An offset is that of the payload.

    The library groups members into samples. :class:`TarMembers` checks the headers, because the library reads a tar
    that is cut between members without an error. Only text and JSON members are decoded. A key is the name up to the
    first dot of the base name; members without a dot and hidden files are ignored.
    """

    suffixes = (".tar",)

    def read(self, part: Part, local: Path, intake: Intake) -> Iterator[Document]:
        """Yield one document per sample; its id is that of the JSON, or the key."""
        try:
            from webdataset.tariterators import group_by_keys
        except ImportError:
            raise DataError(
                f"{part.source.path}: webdataset is needed for .tar and is not installed; {EXTRA}"
            ) from None
        seen: set[str] = set()
        with open_stream(part.source, local) as stream:
            members = _members(TarMembers(stream, part.source.path))
            for found in group_by_keys(members, keys=_key_and_number, lcase=False):
                sample = _sample(found.pop("__key__"), [found[name] for name in found if name != "__url__"], seen)
                try:
                    document = _document(sample, intake)
                except BadRecord as problem:
                    intake.reject(sample.offset, str(problem))
                    continue
                if document is not None:
                    yield document


@dataclass
class _Member:
    """A member of a sample; ``payload`` is None if it is not needed or too big."""

    info: tarfile.TarInfo
    offset: int
    extension: str
    payload: bytes | None


@dataclass
class _Sample:
    """Text and JSON of the members with one key."""

    key: str
    offset: int  # of its text, or else of its first member
    problem: str | None = None
    text: bytes | None = None
    meta: bytes | None = None
    meta_offset: int = 0


def _document(sample: _Sample, intake: Intake) -> Document | None:
    fields = intake.fields
    if sample.problem is not None:
        raise BadRecord(sample.problem)
    if sample.text is None and sample.meta is None:
        raise BadRecord(f"sample {sample.key!r} has neither a .txt nor a .json member; add one")
    record = {}
    if sample.meta is not None:
        bom = len(BOM) if sample.meta.startswith(BOM) else 0
        record = parse_object(sample.meta[bom:], sample.meta_offset + bom, fields.text_field)
    identity = id_of(record, fields)
    if not identity:
        identity = sample.key
        encodable(identity, "the name of the member")
    if sample.text is None:
        return intake.document(sample.offset, identity, text_of(record, fields))
    bom = len(BOM) if sample.text.startswith(BOM) else 0
    return intake.document(sample.offset, identity, decode(sample.text[bom:], sample.offset + bom))


def _members(tar: TarMembers) -> Iterator[dict[str, Any]]:
    """Yield members of samples in the form for :func:`webdataset.tariterators.group_by_keys`.

    The name is (key, number), so that the library does not merge two members of one name.
    """
    key, taken = None, set[str]()
    for number, info in enumerate(tar):
        match = NAME.fullmatch(info.name)
        if match is None or info.isdir():
            continue
        extension = match[2].lower()
        if match[1] != key:
            key, taken = match[1], set()
        wanted = extension in TEXTS and extension not in taken and info.isreg() and info.size <= records.MAX_LINE
        offset = info.offset_data
        payload = tar.payload() if wanted else None
        taken.add(extension)
        member = _Member(info, offset, extension, payload)
        yield {"fname": (key, str(number)), "data": member, "__url__": ""}


def _key_and_number(name: tuple[str, str]) -> tuple[str, str]:
    return name


def _sample(key: str, members: list[_Member], seen: set[str]) -> _Sample:
    """Make the sample of the members with one key, with its problem, if any; ``seen`` has the earlier keys."""
    sample = _Sample(key, members[0].offset)
    if key in seen:
        sample.problem = f"a second sample with the key {key!r}; rename it"
    seen.add(key)
    for member in members:
        if member.extension in TEXTS and sample.problem is None:
            sample.problem = _take(sample, member)
    return sample


def _take(sample: _Sample, member: _Member) -> str | None:
    """Put the payload of a member into its sample; returns the problem, if any."""
    if not member.info.isreg():
        return f"member {member.info.name!r} is a link or device, not a file; store the file itself"
    if (sample.text if member.extension == "txt" else sample.meta) is not None:
        return f"a second .{member.extension} member of the key {sample.key!r}; rename it"
    if member.payload is None:
        return too_big(member.info.size, "member")
    if member.extension == "txt":
        sample.text, sample.offset = member.payload, member.offset
    else:
        sample.meta, sample.meta_offset = member.payload, member.offset
        if sample.text is None:
            sample.offset = member.offset
    return None
