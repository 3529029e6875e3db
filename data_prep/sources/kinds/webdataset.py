"""WebDataset tars, one document per sample: its `.txt` member, or the fields of its `.json` member."""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from data_prep.errors import DataError
from data_prep.sources import records
from data_prep.sources.inputs import EXTRA, Compression, Document, Part
from data_prep.sources.kinds import INPUT_KINDS, InputKind, kind_of
from data_prep.sources.records import (
    BOM,
    BadRecord,
    Intake,
    decode_file,
    encodable,
    id_of,
    parse_object,
    text_of,
    too_big,
    wide_encoding,
    wide_remedy,
)
from data_prep.sources.streams import open_stream
from data_prep.sources.tar import TarMembers

NAME = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]*)", re.DOTALL)  # key, then all extensions; no hidden files
TEXTS = ("txt", "json")
RULE = "by WebDataset's rule the key ends at the first dot of the base name"


class WebDataset(InputKind):
    """WebDataset tars of text. Consecutive members with one key are one sample. An offset is that of the payload.

    The library groups members into samples. :class:`TarMembers` checks the headers, because the library reads a tar
    that is cut between members without an error. Only text and JSON members are decoded. A key is the name up to the
    first dot of the base name. Every text that is left out is counted: each of those that share a sample, members
    without an extension, hidden ones.
    """

    suffixes = (".tar",)
    packed_suffixes: ClassVar[Mapping[str, Compression]] = {
        ".tgz": "gz",
        ".tzst": "zst",
        ".tbz": "bz2",
        ".tbz2": "bz2",
        ".txz": "xz",
    }

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
            members = _members(TarMembers(stream, part.source.path), intake)
            for found in group_by_keys(members, keys=_key_and_number, lcase=False):
                key = found.pop("__key__")
                members_found = [found[name] for name in found if name != "__url__"]
                sample = _sample(key, members_found, seen)
                try:
                    document = _document(sample, intake)
                except BadRecord as problem:
                    if sample.text is None and sample.meta is None:
                        _check_kinds(part.source.path, members_found)
                    for offset in _lost(sample, members_found):
                        intake.reject(offset, str(problem))
                    continue
                for _ in range(sum(member.dotted for member in members_found)):
                    intake.skipped("member")
                if document is not None:
                    yield document


@dataclass
class _Member:
    """A member of a sample; ``payload`` is None if it is not needed or too big."""

    info: tarfile.TarInfo
    offset: int
    extension: str
    payload: bytes | None

    @property
    def dotted(self) -> bool:
        """True for a text whose name has more dots than its sample's texts may have, ``a.b.txt``."""
        return self.extension.endswith(".txt")


@dataclass
class _Sample:
    """Text and JSON of the members with one key."""

    key: str
    offset: int  # of its text, or else of its first member
    problem: str | None = None
    text: bytes | None = None
    meta: bytes | None = None
    meta_offset: int = 0
    dotted: _Member | None = None  # the first text or JSON whose name has more dots
    lost: int = 0  # such members


def _document(sample: _Sample, intake: Intake) -> Document | None:
    fields = intake.fields
    if sample.problem is not None:
        raise BadRecord(sample.problem)
    if sample.text is None and sample.meta is None:
        raise BadRecord(_no_text(sample))
    record = {}
    if sample.meta is not None:
        encoding = wide_encoding(sample.meta)
        if encoding is not None:
            raise BadRecord(wide_remedy(encoding))
        bom = len(BOM) if sample.meta.startswith(BOM) else 0
        meta = intake.without_nul(sample.meta[bom:])
        record = parse_object(meta, sample.meta_offset + bom, fields.text_field)
    identity = id_of(record, fields)
    if not identity:
        identity = sample.key
        encodable(identity, "the name of the member")
    if sample.text is None:
        return intake.document(sample.offset, identity, text_of(record, fields))
    return intake.document(sample.offset, identity, decode_file(sample.text, sample.offset))


def _no_text(sample: _Sample) -> str:
    if sample.dotted is None:
        return f"sample {sample.key!r} has neither a .txt nor a .json member; add one"
    name, extension = sample.dotted.info.name, sample.dotted.extension
    more = f", one of {sample.lost} documents left out with it" if sample.lost > 1 else ""
    return f"member {name!r} is .{extension} of the sample {sample.key!r}{more}: {RULE}; give names one dot only"


def _lost(sample: _Sample, members: Sequence[_Member]) -> list[int]:
    """Offsets of the documents that a sample which cannot be used has: of each text, or else of each JSON, or one."""
    for ending in TEXTS:
        found = [member.offset for member in members if f".{member.extension}".endswith(f".{ending}")]
        if found:
            return found if len(found) > 1 else [sample.offset]
    return [sample.offset]


def _check_kinds(path: str, members: Sequence[_Member]) -> None:
    """Raise DataError for a member that is an input file of its own: the number of its documents is not known."""
    for member in members:
        kind = kind_of(f"x.{member.extension}")
        if kind is None or not member.info.isreg() or member.extension.rpartition(".")[2] in TEXTS:
            continue
        if not INPUT_KINDS.instance(kind[0]).partner:
            raise DataError(
                f"{path}: member {member.info.name!r} is a file of documents; unpack the tar and give its files"
            )


def _members(tar: TarMembers, intake: Intake) -> Iterator[dict[str, Any]]:
    """Yield members of samples in the form for :func:`webdataset.tariterators.group_by_keys`.

    The name is (key, number), so that the library does not merge two members of one name.
    """
    key, taken = None, set[str]()
    for number, info in enumerate(tar):
        match = NAME.fullmatch(info.name)
        if info.isdir():
            continue
        if match is None:
            if info.isreg():
                intake.skipped("hidden" if info.name.rpartition("/")[2].startswith(".") else "unnamed")
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
        if member.extension.endswith((".txt", ".json")):
            sample.dotted = sample.dotted or member
            sample.lost += 1
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
