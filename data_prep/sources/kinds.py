"""What is read: the kinds of files, their parts, and the document that comes out."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, NamedTuple, get_args

from pydantic import BaseModel, ConfigDict, Field, model_validator

from data_prep.format.remote import is_remote

Kind = Literal["jsonl", "text", "parquet", "tar"]
Compression = Literal["gz", "zst"]
KINDS: dict[str, Kind] = {".jsonl": "jsonl", ".txt": "text", ".parquet": "parquet", ".tar": "tar"}
SUFFIXES: dict[str, tuple[Kind, Compression | None]] = {
    **{suffix: (kind, None) for suffix, kind in KINDS.items()},
    **{
        f"{suffix}.{packed}": (kind, packed)
        for suffix, kind in KINDS.items()
        for packed in get_args(Compression)
        if kind != "parquet"  # it packs its columns itself
    },
}
EXTRA = "pip install 'bd3-megatron[data]'"


class Fields(BaseModel):
    """Where a record holds its text and id, and which texts are kept."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    text_field: str = Field("text", description="JSON field or Parquet column that holds the text")
    id_field: str = Field("id", description="JSON field or Parquet column that names the document; may be absent")
    text_documents: Literal["line", "file"] = Field("line", description="what one document of a .txt file is")
    min_chars: int = Field(1, ge=1, description="documents with fewer characters are left out, white space trimmed")
    max_chars: int | None = Field(None, ge=1, description="documents with more characters are left out; null: none")

    @model_validator(mode="after")
    def _something_is_kept(self) -> Fields:
        if self.max_chars is not None and self.max_chars < self.min_chars:
            raise ValueError(
                f"max_chars={self.max_chars}: below min_chars={self.min_chars}, so no document is kept; raise it"
            )
        return self


class Document(NamedTuple):
    """One document and where it came from."""

    id: str
    text: str
    source: str  # base name of the file
    offset: int  # of the record, as read_part counts for the kind of file


@dataclass(frozen=True)
class Source:
    """One file as it was when it was listed."""

    path: str  # local path or URL
    name: str  # base name
    kind: Kind
    compression: Compression | None
    bytes: int  # as stored
    stamp: str  # changes when the file does: mtime_ns locally, what the store offers (an ETag, a date) elsewhere

    @property
    def remote(self) -> bool:
        """Whether the file must be fetched before it is read."""
        return is_remote(self.path)


@dataclass(frozen=True)
class Part:
    """What one task reads of a source.

    Plain JSONL and text: the lines that start at bytes ``begin`` to ``end - 1``. Local Parquet: the row groups
    ``begin`` to ``end - 1``. Everything else: the whole file, written as ``(0, source.bytes)``.
    """

    source: Source
    begin: int
    end: int
    stored: int | None = field(default=None, compare=False, repr=False)  # bytes, where begin and end are not bytes

    @property
    def weight(self) -> int:
        """Stored bytes this part stands for; the weights of all parts add up to ``source.bytes``."""
        return self.end - self.begin if self.stored is None else self.stored


def kind_of(name: str) -> tuple[Kind, Compression | None] | None:
    """Kind and compression that a file name tells, or None if it is none that can be read."""
    return next((kind for suffix, kind in SUFFIXES.items() if name.endswith(suffix)), None)
