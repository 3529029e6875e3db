"""Input files as listed, their parts, and documents."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, model_validator

from data_prep.format.remote import is_remote

if TYPE_CHECKING:
    import numpy as np

Compression = Literal["gz", "zst", "bz2", "xz"]
PACKED: dict[str, Compression] = {".gz": "gz", ".zst": "zst", ".zstd": "zst", ".bz2": "bz2", ".xz": "xz"}
"""compression by the suffix of a file's name"""
EXTRA = "pip install 'bd3-megatron[data]'"


class Fields(BaseModel):
    """Names of the text and id fields, and the lengths of texts to keep."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    text_field: str = Field(default="text", description="JSON field or column of the text; a.b is field b of a")
    id_field: str = Field(default="id", description="field or column of the document's id; may be absent")
    text_documents: Literal["line", "file"] = Field(
        default="line", description="unit of a .txt file that is one document"
    )
    min_chars: int = Field(
        default=1,
        ge=1,
        description="fewest characters of a document, after trimming white space; shorter ones are skipped",
    )
    max_chars: int | None = Field(
        default=None, ge=1, description="most characters of a document; longer ones are skipped; null: no limit"
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
    offset: int  # of the record, in the unit of the input kind


class TokenDocument(NamedTuple):
    """One document of token ids, which is not tokenized again."""

    id: str
    ids: np.ndarray  # [n], integers
    source: str
    offset: int


AnyDocument = Document | TokenDocument


@dataclass(frozen=True)
class Source:
    """One file as it was listed."""

    path: str  # local path or URL
    name: str  # base name
    kind: str  # name in INPUT_KINDS
    compression: Compression | None
    bytes: int  # as stored; those of a partner included
    stamp: str  # changes when the file does: mtime_ns of local files, an ETag or date of remote ones

    @property
    def remote(self) -> bool:
        """True for a file that must be fetched before it is read."""
        return is_remote(self.path)


@dataclass(frozen=True)
class Part:
    """The part of a source that one job reads: ``begin`` to ``end - 1``, in the unit of the input kind.

    Plain JSONL and text: the lines that start at these bytes. Local Parquet: row groups. The whole of any file is
    ``(0, source.bytes)``.
    """

    source: Source
    begin: int
    end: int
    stored: int | None = field(default=None, compare=False, repr=False)  # bytes, where begin and end are not bytes

    @property
    def weight(self) -> int:
        """Stored bytes of this part; those of all parts sum to ``source.bytes``."""
        return self.end - self.begin if self.stored is None else self.stored
