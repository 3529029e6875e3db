"""Header of a safetensors file, checked before the library reads the tensors: names, types, shapes and places."""

from __future__ import annotations

import math
import os
import stat
from pathlib import Path
from typing import Annotated, BinaryIO, NamedTuple

from pydantic import Field, model_validator

from bd3_common import schema
from bd3_common.errors import UserError
from bd3_common.schema import MAX_COUNT, Count, Record
from bd3_common.text import shorten

WIDTHS = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3"), 1),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 2),
    **dict.fromkeys(("I32", "U32", "F32"), 4),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 8),
}
"""bytes of an element by the format's names of types"""
MAX_HEADER = 100_000_000
METADATA = "__metadata__"
"""key of the header that is no tensor"""


class TensorPlace(Record):
    """Type, shape and place of one tensor; offsets count from the end of the header."""

    dtype: str
    shape: Annotated[list[Count], Field(max_length=16)]
    data_offsets: Annotated[list[Count], Field(min_length=2, max_length=2)]

    @model_validator(mode="after")
    def _size(self) -> TensorPlace:
        begin, end = self.data_offsets
        if self.dtype not in WIDTHS:
            raise ValueError(f"dtype={shorten(self.dtype)}: not a type of safetensors that is read here")
        # Zeros aside: a shape like [0, 2^53, 2^53] has no bytes, and still a size that overflows.
        if math.prod(size for size in self.shape if size) > MAX_COUNT:
            raise ValueError("has more elements than a file can hold")
        if end - begin != math.prod(self.shape) * WIDTHS[self.dtype]:
            raise ValueError(f"its {end - begin} bytes are not those of {self.dtype}{shorten(self.shape)}")
        return self


class _Header(Record):
    tensors: dict[str, TensorPlace]
    metadata: dict[str, str] = Field(default={})


class TensorHeader(NamedTuple):
    """Tensors by name, the file's metadata, and the byte at which tensors begin."""

    tensors: dict[str, TensorPlace]
    metadata: dict[str, str]
    begin: int


def open_tensors(path: Path) -> BinaryIO:
    """Open a file for :func:`read_header`; a pipe in its place is not waited for.

    Raises:
        OSError: it cannot be opened.
    """
    return open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))


def read_header(file: BinaryIO, path: Path, error: type[UserError] = UserError, remedy: str = "") -> TensorHeader:
    """Header of an open file, at its start.

    Args:
        path, remedy: name the file and end the line in errors.

    Raises:
        UserError: of class ``error``: not a regular file, or no safetensors file whose tensors fill it without overlap.
        OSError: it cannot be read.
    """
    ending = f"; {remedy}" if remedy else ""
    found = os.fstat(file.fileno())
    if not stat.S_ISREG(found.st_mode):
        raise error(f"{path}: is not a regular file{ending}")
    size = int.from_bytes(file.read(8), "little")
    if not 2 <= size <= min(MAX_HEADER, found.st_size - 8):
        raise error(
            f"{path}: not a readable safetensors file: a header of {size} bytes in a file of {found.st_size}{ending}"
        )
    content = schema.parse(file.read(size), dict[str, object], path, remedy, error)
    metadata = content.pop(METADATA, {})
    header = schema.check({"tensors": content, "metadata": metadata}, _Header, path, remedy, error)
    end = 0
    for name, place in sorted(header.tensors.items(), key=lambda pair: pair[1].data_offsets):
        begin = place.data_offsets[0]
        if begin != end:
            raise error(f"{path}: {shorten(name)}: begins at byte {begin}, where {end} is expected{ending}")
        end = place.data_offsets[1]
    if end != found.st_size - 8 - size:
        raise error(f"{path}: has {found.st_size - 8 - size} bytes of tensors, its header says {end}{ending}")
    return TensorHeader(header.tensors, header.metadata, 8 + size)
