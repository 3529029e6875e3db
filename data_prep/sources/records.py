"""Records to documents: parsing, decoding, and one-line reasons for rejecting a record."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

from data_prep.sources.inputs import Document, Fields, TokenDocument

if TYPE_CHECKING:
    import numpy as np

MAX_DOCUMENT = 64 << 20  # bytes of UTF-8 in one document: each process has several copies in memory
MAX_LINE = MAX_DOCUMENT + (1 << 20)  # bytes read of one line or member, with room for JSON around the text
BOM = b"\xef\xbb\xbf"
_WIDE_HEAD = 256  # bytes that tell UTF-16 and UTF-32
_DEEPEST = 4  # levels of fields that a message suggests


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant)


class BadRecord(Exception):
    """A record that cannot be used; its text is one line with the problem, the value and the remedy."""


class Intake:
    """Filter of documents: short and long ones go to ``skipped``, bad ones to ``reject``.

    Args:
        name: base name of the file.
        reject: called with (offset, one-line reason) for each document that cannot be used.
        skipped: called with the reason, one word, for each document that is left out on purpose.
        removed: called with the number of NUL characters that were removed from a document.
    """

    def __init__(
        self,
        name: str,
        fields: Fields,
        reject: Callable[[int, str], None],
        skipped: Callable[[str], None],
        removed: Callable[[int], None] = lambda count: None,
    ):
        self.name, self.fields, self.reject, self.skipped, self.removed = name, fields, reject, skipped, removed
        self._min, self._max = fields.min_chars, fields.max_chars

    def document(self, offset: int, identity: str, text: str) -> Document | None:
        """Make a document, or call ``skipped`` and return None. An empty ``identity`` means that the record has no id.

        NUL characters are removed and counted.

        Raises:
            BadRecord: the text is too big or has a lone surrogate.
        """
        if "\0" in text:
            plain = text.replace("\0", "")
            self.removed(len(text) - len(plain))
            text = plain
        size = len(text) if text.isascii() else len(encodable(text, "the text"))
        if size > MAX_DOCUMENT:
            raise BadRecord(too_big(size, "document"))
        chars = len(text.strip())
        if chars < self._min:
            self.skipped("short")
        elif self._max is not None and chars > self._max:
            self.skipped("long")
        else:
            return Document(identity or f"{self.name}:{offset}", text, self.name, offset)
        return None

    def tokens(self, offset: int, identity: str, ids: np.ndarray) -> TokenDocument | None:
        """Make a document of token ids ``[n]``; as :meth:`document`. Lengths in characters do not apply."""
        if not len(ids):
            self.skipped("short")
            return None
        return TokenDocument(identity or f"{self.name}:{offset}", ids, self.name, offset)

    def without_nul(self, data: bytes) -> bytes:
        """``data`` without NUL bytes, which are counted."""
        plain = data.replace(b"\0", b"")
        if len(plain) < len(data):
            self.removed(len(data) - len(plain))
        return plain


def wide_encoding(head: bytes) -> str | None:
    """``UTF-16`` or ``UTF-32`` if a text that begins with ``head`` is in that encoding; None for UTF-8.

    A byte order mark tells, or NUL bytes in the places where ASCII characters have them. A few stray NUL characters
    in UTF-8 do not look like that.
    """
    if head.startswith((b"\xff\xfe\0\0", b"\0\0\xfe\xff")):
        return "UTF-32"
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "UTF-16"
    head = head[: min(len(head), _WIDE_HEAD) // 4 * 4]
    zeros = head.count(0)
    if len(head) < 8 or zeros * 8 < len(head):
        return None
    by_place = [sum(head[n] == 0 for n in range(place, len(head), 4)) for place in range(4)]
    first = [byte == 0 for byte in head[:4]]
    if first in ([False, True, True, True], [True, True, True, False]) and sorted(by_place)[1] * 8 >= len(head):
        return "UTF-32"
    even, odd = by_place[0] + by_place[2], by_place[1] + by_place[3]
    # A text of few ASCII characters still begins with them, if it is JSON.
    alternate = first in ([False, True, False, True], [True, False, True, False])
    if (alternate or zeros * 5 >= len(head) * 2) and min(even, odd) * 8 <= max(even, odd):
        return "UTF-16"
    return None


def wide_remedy(encoding: str) -> str:
    """Problem and remedy for a text in UTF-16 or UTF-32."""
    return f"is {encoding}, not UTF-8; convert it: iconv -f {encoding} -t UTF-8"


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


def decode_file(data: bytes, at: int) -> str:
    """Decode the whole of a text file or member at byte ``at``, without its byte order mark.

    Raises:
        BadRecord: it is UTF-16 or UTF-32, or not UTF-8.
    """
    encoding = wide_encoding(data)
    if encoding is not None:
        raise BadRecord(wide_remedy(encoding))
    bom = len(BOM) if data.startswith(BOM) else 0
    return decode(data[bom:], at + bom)


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


def value_at(record: dict[str, Any], field: str) -> Any:
    """The value of a field: of that name, or else of the nested one that ``a.b.c`` names; None if there is none."""
    found = record.get(field)
    if found is not None or "." not in field or field in record:
        return found
    found = record
    for name in field.split("."):
        found = found.get(name) if isinstance(found, dict) else None
    return found


def text_of(record: dict[str, Any], fields: Fields) -> str:
    """The text of a JSON object.

    Raises:
        BadRecord: it is missing or not a string; suggests the likely field.
    """
    text = record.get(fields.text_field)
    if isinstance(text, str):
        return text
    text = value_at(record, fields.text_field)
    if isinstance(text, str):
        return text
    remedy = text_remedy(fields, dict(_strings(record)))
    if text is not None or fields.text_field in record:
        raise BadRecord(f"field {fields.text_field!r} holds a JSON {json_type(text)}, not a string; {remedy}")
    raise BadRecord(f"no field {fields.text_field!r} among {listed(record)}; {remedy}")


def _strings(record: dict[str, Any], prefix: str = "", depth: int = 1) -> Iterator[tuple[str, int]]:
    """Names and lengths of all string fields, nested ones as ``a.b``."""
    for name, value in record.items():
        if isinstance(value, str):
            yield prefix + name, len(value)
        elif isinstance(value, dict) and depth < _DEEPEST:
            yield from _strings(value, f"{prefix}{name}.", depth + 1)


def id_of(record: dict[str, Any], fields: Fields) -> str:
    """The id of a JSON object, as JSON writes it; empty if it has none.

    Raises:
        BadRecord: it is an object or an array.
    """
    identity = value_at(record, fields.id_field)
    if identity is None:
        return ""
    if isinstance(identity, (dict, list)):
        raise BadRecord(
            f"field {fields.id_field!r} holds a JSON {json_type(identity)}; "
            "use a string or a number, leave it out, or choose another --id-field"
        )
    if not isinstance(identity, str):
        identity = scalar_id(identity)
    if not identity.isascii():
        encodable(identity, f"field {fields.id_field!r}")
    return identity


def scalar_id(value: object) -> str:
    """An id from a scalar value: booleans as JSON writes them."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def text_remedy(fields: Fields, strings: dict[str, int]) -> str:
    """Remedy for a message: the option that names the likely text field, given the string fields and their lengths."""
    candidates = {name: length for name, length in strings.items() if name != fields.id_field}
    ends = {name: name.rpartition(".")[2].lower() for name in candidates}
    near = difflib.get_close_matches(fields.text_field.rpartition(".")[2].lower(), list(ends.values()), n=1)
    likely = next((name for name in candidates if near and ends[name] == near[0]), None)
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
