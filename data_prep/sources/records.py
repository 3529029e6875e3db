"""Records to documents: parsing, decoding, and one-line reasons for rejecting a record."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Iterable
from typing import Any

from data_prep.sources.inputs import Document, Fields

MAX_DOCUMENT = 64 << 20  # bytes of UTF-8 in one document: each process has several copies in memory
MAX_LINE = MAX_DOCUMENT + (1 << 20)  # bytes read of one line or member, with room for JSON around the text
BOM = b"\xef\xbb\xbf"


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant)


class BadRecord(Exception):
    """A record that cannot be used; its text is one line with the problem, the value and the remedy."""


class Intake:
    """Filter of documents: short and long ones go to ``skipped``, bad ones to ``reject``."""

    def __init__(self, name: str, fields: Fields, reject: Callable[[int, str], None], skipped: Callable[[str], None]):
        self.name, self.fields, self.reject, self.skipped = name, fields, reject, skipped
        self._min, self._max = fields.min_chars, fields.max_chars

    def document(self, offset: int, identity: str, text: str) -> Document | None:
        """Make a document, or call ``skipped`` and return None. An empty ``identity`` means that the record has no id.

        Raises:
            BadRecord: the text is too big, has a lone surrogate or a NUL.
        """
        size = len(text) if text.isascii() else len(encodable(text, "the text"))
        if size > MAX_DOCUMENT:
            raise BadRecord(too_big(size, "document"))
        if "\0" in text:  # UTF-16 of ASCII text is valid UTF-8 with NULs
            raise BadRecord("holds a NUL character, as UTF-16 or binary data do; convert it to UTF-8 text")
        chars = len(text.strip())
        if chars < self._min:
            self.skipped("short")
        elif self._max is not None and chars > self._max:
            self.skipped("long")
        else:
            return Document(identity or f"{self.name}:{offset}", text, self.name, offset)
        return None


def too_big(size: int, what: str, at_least: bool = False) -> str:
    """Reason for rejecting a document, line or member of ``size`` bytes."""
    over = "over " if at_least else ""
    return f"a {what} of {over}{size} bytes; the limit is {MAX_DOCUMENT}; split it into documents"


def encodable(text: str, what: str) -> bytes:
    """UTF-8 of ``text``.

    Raises:
        BadRecord: it has a lone surrogate, which JSON can encode and UTF-8 cannot.
    """
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise BadRecord(
            f"{what} holds the lone surrogate \\u{ord(text[error.start]):04x} at character {error.start}, "
            "which is no text; replace it"
        ) from None


def decode(data: bytes, at: int, place: str = "byte") -> str:
    """Decode UTF-8; ``at`` is the offset of ``data``, for the message.

    Raises:
        BadRecord: not UTF-8; names position and value of the first wrong byte.
    """
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise BadRecord(
            f"not UTF-8 at {place} {at + error.start} (0x{data[error.start]:02x}); convert the text to UTF-8"
        ) from None


def parse_object(data: bytes, at: int, text_field: str) -> dict[str, Any]:
    """Parse a JSON object at byte ``at`` of the file.

    Raises:
        BadRecord: not UTF-8, not JSON, or not an object.
    """
    try:
        record = _DECODER.decode(decode(data, at))
    except json.JSONDecodeError as error:
        raise BadRecord(f"not JSON ({error.msg}, column {error.colno}); put one object on each line") from None
    except (ValueError, RecursionError) as error:  # NaN, absurdly long numbers, deep nesting
        raise BadRecord(f"not JSON that can be read ({error}); put one plain object on each line") from None
    if not isinstance(record, dict):
        raise BadRecord(f"a JSON {json_type(record)}, not an object; write {{{json.dumps(text_field)}: ...}}")
    return record


def text_of(record: dict[str, Any], fields: Fields) -> str:
    """The text of a JSON object.

    Raises:
        BadRecord: it is missing or not a string; suggests the likely field.
    """
    text = record.get(fields.text_field)
    if isinstance(text, str):
        return text
    strings = {name: len(value) for name, value in record.items() if isinstance(value, str)}
    remedy = text_remedy(fields, strings)
    if fields.text_field in record:
        raise BadRecord(f"field {fields.text_field!r} holds a JSON {json_type(text)}, not a string; {remedy}")
    raise BadRecord(f"no field {fields.text_field!r} among {listed(record)}; {remedy}")


def id_of(record: dict[str, Any], fields: Fields) -> str:
    """The id of a JSON object, empty if it has none.

    Raises:
        BadRecord: it is neither a string nor an integer.
    """
    identity = record.get(fields.id_field)
    if identity is None:
        return ""
    if isinstance(identity, bool) or not isinstance(identity, str | int):
        raise BadRecord(
            f"field {fields.id_field!r} holds a JSON {json_type(identity)}; "
            "use a string or an integer, leave it out, or choose another --id-field"
        )
    identity = str(identity)
    if not identity.isascii():
        encodable(identity, f"field {fields.id_field!r}")
    return identity


def text_remedy(fields: Fields, strings: dict[str, int]) -> str:
    """Remedy for a message: the option that names the likely text field, given the string fields and their lengths."""
    candidates = {name: length for name, length in strings.items() if name != fields.id_field}
    near = difflib.get_close_matches(fields.text_field.lower(), [name.lower() for name in candidates], n=1)
    likely = next((name for name in candidates if near and name.lower() == near[0]), None)
    likely = likely if likely is not None else max(candidates, key=candidates.__getitem__, default=None)
    return "give every document a text" if likely is None else f"use --text-field {one_line(likely)}"


def listed(names: Iterable[str], most: int = 20) -> str:
    """The first ``most`` names and the number of others, for a message."""
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(repr(name[:80]) for name in names[:most]) + more or "none at all"


def one_line(text: str) -> str:
    """A name for a message; a long one, or one with spaces or control characters, is quoted and shortened."""
    return text if text.isprintable() and " " not in text and len(text) <= 80 else repr(text[:80])


def json_type(value: object) -> str:
    """JSON's name for the type of a parsed value."""
    names = {dict: "object", list: "array", str: "string", bool: "boolean", type(None): "null"}
    return names.get(type(value), "number")
