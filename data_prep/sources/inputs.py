"""Input files as they were listed, their parts, and the documents that come out."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, model_validator

from data_prep.format.remote import is_remote

Compression = Literal["gz", "zst"]
EXTRA = "pip install 'bd3-megatron[data]'"


class Fields(BaseModel):
    """Where a record holds its text and id, and which texts are kept."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    text_field: str = Field(default="text", description="JSON field or Parquet column that holds the text")
    id_field: str = Field(default="id", description="field that names the document; may be absent")
    text_documents: Literal["line", "file"] = Field(default="line", description="what one document of a .txt file is")
    min_chars: int = Field(
        default=1, ge=1, description="shorter documents are left out: characters, white space trimmed"
    )
    max_chars: int | None = Field(
        default=None, ge=1, description="longer documents are left out; null: none is too long"
    )

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
    kind: str  # name in INPUT_KINDS
    compression: Compression | None
    bytes: int  # as stored
    stamp: str  # changes when the file does: mtime_ns locally, what the store offers (an ETag, a date) elsewhere

    @property
    def remote(self) -> bool:
        """Whether the file must be fetched before it is read."""
        return is_remote(self.path)


@dataclass(frozen=True)
class Part:
    """A share of a source that one job reads: units ``begin`` to ``end - 1``, which the input kind counts.

    Plain JSONL and text: the lines that start at these bytes. Local Parquet: row groups. The whole of any file is
    ``(0, source.bytes)``.
    """

    source: Source
    begin: int
    end: int
    stored: int | None = field(default=None, compare=False, repr=False)  # bytes, where begin and end are not bytes

    @property
    def weight(self) -> int:
        """Stored bytes this part stands for; the weights of all parts add up to ``source.bytes``."""
        return self.end - self.begin if self.stored is None else self.stored
