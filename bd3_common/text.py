"""Text from outside made fit for a terminal or a log: one line, without control characters."""

from __future__ import annotations

import unicodedata

_HIDDEN = {"Cc", "Cf", "Cs", "Co", "Zl", "Zp"}
"""Unicode categories: control, format (bidirectional overrides among them), surrogates, private, line separators"""


def printable(text: str, keep: str = "") -> str:
    r"""``text`` with control and format characters written as escapes: ``\x1b``, ``\u202e``.

    Args:
        keep: characters to leave as they are, for example a line end.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(c if c in keep or unicodedata.category(c) not in _HIDDEN else _escape(c) for c in text)


def shorten(value: object, length: int = 60) -> str:
    """``value`` as one printable line of at most ``length`` characters, for an error message."""
    text = printable(value[: length + 1] if isinstance(value, str) else _bounded_repr(value, length))
    return text if len(text) <= length else text[: length - 3] + "..."


def _bounded_repr(value: object, length: int) -> str:
    """``repr`` for scalars; the type and size of a container or a huge number, which could fill memory when written."""
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > 8 * length:
        return f"an integer of {value.bit_length()} bits"
    if isinstance(value, list | tuple | set | dict):
        return f"a {type(value).__name__} of {len(value)}" if value else repr(value)
    return repr(value[: length + 1]) if isinstance(value, bytes) else repr(value)


def _escape(character: str) -> str:
    code = ord(character)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
