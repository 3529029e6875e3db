"""One reader for all JSON that comes from outside: size, depth, types, bounds, no NaN; one line says what is wrong.

A schema is a pydantic model or any type that pydantic can check, for example ``list[int]``. Bounds are part of it:
``Annotated[int, Field(ge=0, le=MAX_COUNT)]``. Checks are strict: text is no number, 1 is no boolean.
"""

from __future__ import annotations

import stat
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, TypeVar, cast

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic_core import from_json

from bd3_common.errors import UserError
from bd3_common.text import shorten

T = TypeVar("T")

MAX_BYTES = 256 << 20
"""bytes of a file that is read whole"""
MAX_COUNT = 2**53
"""largest count or offset: beyond it JSON readers of other languages round"""
MAX_LENGTH = 2**22
"""most tokens of a row"""
MAX_VOCABULARY = 2**24
"""most ids of a tokenizer: a count of each must fit the memory of a worker"""

Count = Annotated[int, Field(ge=0, le=MAX_COUNT)]
"""a number of bytes, rows, tokens or steps"""
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Record(BaseModel):
    """Base of schemas: immutable, strict, without NaN; unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class OpenRecord(Record):
    """Base of schemas whose files may have further keys, which are ignored: other programs' files, later versions."""

    model_config = ConfigDict(extra="ignore")


def _inside(name: str) -> str:
    parts = PurePosixPath(name).parts
    if not parts or name.startswith("/") or ".." in parts or "\\" in name or "\0" in name or len(name) > 1024:
        raise ValueError("must be a path inside the folder of its file")
    return name


InnerPath = Annotated[str, AfterValidator(_inside)]
"""a relative path that does not leave the folder of the file that names it"""


def parse(
    data: bytes | str,
    schema: type[T],
    where: object,
    remedy: str = "",
    error: type[UserError] = UserError,
    nan: bool = False,
) -> T:
    """The value of a JSON text that fits ``schema``.

    Args:
        where: names the text in the error: a file, or a file and a line.
        remedy: ends the error: ``; REMEDY``.
        error: class to raise.
        nan: allow NaN and infinities, as a record of a step that went wrong has them.

    Raises:
        UserError: of class ``error``, one line: it is no JSON, too deep, has NaN, or does not fit.
    """
    ending = f"; {remedy}" if remedy else ""
    try:
        tree(data, nan)  # syntax, depth and NaN, also in parts of type Any
        value: T = _adapter(cast(Any, schema)).validate_json(data, strict=True)
    except ValidationError as invalid:
        raise error(f"{where}: {_first(invalid)}{ending}") from None
    except (ValueError, RecursionError) as broken:
        raise error(f"{where}: is no JSON: {shorten(str(broken), 120)}{ending}") from None
    return value


def tree(data: bytes | str, nan: bool = False) -> Any:
    """The plain value of a JSON text, for content of no fixed schema.

    Raises:
        ValueError: no JSON, NaN, nested more than 200 deep, or a number of thousands of digits.
    """
    return from_json(data, allow_inf_nan=nan, cache_strings=False)


def check(value: object, schema: type[T], where: object, remedy: str = "", error: type[UserError] = UserError) -> T:
    """``value``, already parsed (YAML, a header), if it fits ``schema``; arguments and errors as in :func:`parse`."""
    try:
        checked: T = _adapter(cast(Any, schema)).validate_python(value)
    except ValidationError as invalid:
        raise error(f"{where}: {_first(invalid)}{f'; {remedy}' if remedy else ''}") from None
    return checked


def read(
    path: Path,
    schema: type[T],
    remedy: str = "",
    error: type[UserError] = UserError,
    max_bytes: int = MAX_BYTES,
) -> T:
    """:func:`parse` of a file.

    Raises:
        UserError: of class ``error``: as :func:`parse`, or the file is too large or no regular file.
        OSError: it cannot be read.
    """
    return parse(read_bytes(path, error, max_bytes), schema, path, remedy, error)


def read_bytes(path: Path, error: type[UserError] = UserError, max_bytes: int = MAX_BYTES) -> bytes:
    """A whole regular file of at most ``max_bytes``; errors as in :func:`read`."""
    if not stat.S_ISREG(path.stat().st_mode):  # opening a pipe would wait for its writer
        raise error(f"{path}: is not a regular file")
    with path.open("rb") as file:
        # Not max_bytes at once: a read takes its memory before it knows how much there is.
        data = file.read(min(path.stat().st_size, max_bytes) + 1)
        while len(data) <= max_bytes and (more := file.read(1 << 20)):
            data += more
    if len(data) > max_bytes:
        raise error(f"{path}: has more than {max_bytes} bytes, which no file of this kind has")
    return data


@cache
def _adapter(schema: Any) -> TypeAdapter[Any]:
    return TypeAdapter(schema)


def _first(invalid: ValidationError) -> str:
    """``splits.train.shards[0].name: value 5: input should be a valid string``: the first of the faults."""
    found = invalid.errors(include_url=False, include_context=False)[0]
    place = ""
    for key in found["loc"]:
        place += f"[{key}]" if isinstance(key, int) else f".{shorten(key, 40)}" if place else shorten(key, 40)
    text = found["msg"].removeprefix("Value error, ").replace("a valid dictionary", "an object")
    if found["type"] == "missing":
        return f"{place}: is missing"
    if found["type"] == "extra_forbidden":
        return f"{place}: unknown key"
    value = f"value {shorten(found['input'])}: "
    if not place:
        value = "" if found["type"] == "value_error" else value
    return f"{place}{': ' if place else ''}{value}{text[:1].lower()}{shorten(text[1:], 160)}"
