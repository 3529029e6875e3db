"""Text from outside made fit for a terminal, a log or a script: no control characters, no passwords."""

from __future__ import annotations

import json
import re
import shlex
import sys
import unicodedata
from typing import Any, TextIO

_HIDDEN = {"Cc", "Cf", "Cs", "Co", "Zl", "Zp"}
"""Unicode categories: control, format (bidirectional overrides among them), surrogates, private, line separators"""
_JOINERS = "\u200c\u200d"
"""format characters that scripts such as Persian and Hindi are written with"""
_LINES = "\n\t"


def printable(text: str, keep: str = "") -> str:
    r"""``text`` with control and format characters written as escapes: ``\x1b``, ``\u202e``.

    Args:
        keep: characters to leave as they are, for example a line end.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(c if c in keep or not _is_hidden(c) else _escape(c) for c in text)


def first_hidden(text: str, keep: str = "") -> str | None:
    """The first control or format character of ``text``, written as an escape; None if there is none."""
    return next((_escape(c) for c in text if c not in keep and _is_hidden(c)), None)


def show(text: str, file: TextIO | None = None) -> None:
    """Print text that may hold text from outside, in lines, on stdout unless ``file`` is given."""
    print(redacted(printable(text, keep=_LINES)), file=file or sys.stdout, flush=file is not None)


def json_line(value: Any) -> str:
    """``value`` as one line of JSON for people and programs: letters as they are, control characters as escapes."""
    text = json.dumps(value, ensure_ascii=False)
    if text.isascii() and text.isprintable():
        return text
    return "".join(json.dumps(c)[1:-1] if _is_hidden(c) else c for c in text)


# Texts may be long and made to be slow: each of these finds its matches in time proportional to the text.
_USER = re.compile(r"(?<![\w+.-])(?P<scheme>[\w+.-]+://)(?P<user>[^/\s@]*)@")
_QUERY = re.compile(r"[?&](?P<name>[\w.-]+)=")
_VALUE = re.compile(r"[^&\s#'\")]+")
_PRIVATE_QUERIES = ("signature", "credential", "token", "secret", "password", "key")


def redacted(text: str) -> str:
    """``text`` with ``***`` for the passwords and signatures of URLs in it."""
    if "://" not in text:
        return text
    return _without_signatures(_USER.sub(_without_user, text))


def _without_user(found: re.Match[str]) -> str:
    scheme, user = found["scheme"], found["user"]
    before, colon, _ = user.partition(":")
    private = not {"?", "#"} & set(before) and bool(colon or (user and scheme.endswith(("http://", "https://"))))
    return f"{scheme}***@" if private else found[0]


def _without_signatures(text: str) -> str:
    parts, end = [], 0
    for found in _QUERY.finditer(text):
        name = found["name"].lower()
        private = name == "sig" or any(word in name for word in _PRIVATE_QUERIES)
        # A value may hold a URL with a query of its own: only private ones are passed over.
        if private and found.start() >= end and (value := _VALUE.match(text, found.end())):
            parts += [text[end : found.end()], "***"]
            end = value.end()
    return "".join(parts) + text[end:]


_PRIVATE_WORDS = {"auth", "authorization", "bearer", "cookie", "cred", "creds", "jwt", "pass", "passwd", "pat"}
_PRIVATE_PARTS = ("apikey", "credential", "passphrase", "password", "secret", "signature")
_PRIVATE_ENDS = ("key", "keys", "token", "tokens")
_TOKEN = re.compile(
    r"(?<![A-Za-z0-9])(?:eyJ[\w-]{6,}|(?:AKIA|ASIA)[0-9A-Z]{16}|AIza[\w-]{35}|hf_[A-Za-z0-9]{20,}|gh[pousr]_[A-Za-z0-9]{20,}|"
    r"github_pat_\w{20,}|glpat-[\w-]{20,}|sk-(?:[a-z]+-)?[A-Za-z0-9]{20,}|xox[abprs]-\d+-[\w-]+|nvapi-[\w-]{40,})|"
    r"-----BEGIN |(?i:bearer|basic)\s+[\w+/.=-]{16,}"
)
"""tokens of known services"""
_UUID = re.compile(r"[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")
_WORD, _UNBROKEN = re.compile(r"\w+"), re.compile(r"[A-Za-z0-9]{32,}")
_ASSIGNED = re.compile(r"(?<![\w-])([\w-]+)=(?:\"([^\"]*)\"|'([^']*)'|([^\s,;]*))")


_LOOKED_UP = re.compile(r"\$\(|(?:\$\w+|\$\{\w+\})(?:/.*)?$")
"""values that the shell looks up: a command's output, a variable, or a path below one"""
_PLAIN = re.compile(r"-|/|\.|\d+$|.{0,5}$")
"""values of an option that are no secret, whatever its name: options, paths, numbers, short words"""
_LONG = 10_000  # characters of a line that is cut at spaces only
_NAMED_BY_HASH = re.compile(r"/|sha256:")  # paths and images


def is_secret(name: str, value: str) -> bool:
    """True for a variable that looks like a secret, by its name (``*_TOKEN``, ``SLURM_JWT``) or its value."""
    words = re.split(r"[_\W]+", name.lower())
    return bool(value) and (
        not _PRIVATE_WORDS.isdisjoint(words)
        or any(part in name.lower() for part in _PRIVATE_PARTS)
        or any(word.endswith(_PRIVATE_ENDS) for word in words)
        or has_token(value)
        or _is_base64_key(value)
        # Paths may have hashes in them.
        or ("/" not in value and not _UUID.search(value) and any(map(_is_random, _WORD.findall(value))))
    )


def _is_random(word: str) -> bool:
    """True for letters and digits without a separator, as keys have them, with more of the word after them or not."""
    found = _UNBROKEN.search(word)
    rest = word[found.start() :] if found else ""
    return bool(re.search(r"\d", rest) and re.search(r"[A-Za-z]", rest))


def _is_base64_key(word: str) -> bool:
    """True for 40 characters of base64 in both cases and with digits, as the keys of object stores have them."""
    kinds = (r"[a-z]", r"[A-Z]", r"\d")
    return bool(re.fullmatch(r"[A-Za-z0-9+][A-Za-z0-9/+]{39}", word)) and all(re.search(kind, word) for kind in kinds)


def has_token(value: str) -> bool:
    """True for a text with a URL's password or a token of a known form in it."""
    return redacted(value) != value or bool(_TOKEN.search(value))


def secret_in(text: str) -> str | None:
    """Name of what looks like a secret in a line of the shell, such as ``export HF_TOKEN=hf_...``; None without one.

    What the shell looks up when it runs the line, as in ``$(cat FILE)``, is none.
    """
    for name, *quoted in _ASSIGNED.findall(text):
        value = "".join(quoted)
        if not _LOOKED_UP.match(value) and is_secret(name, value):
            return str(name)
    words = _words(text)
    for before, word in zip(["", *words], words):
        if before in ("-u", "--user") and re.fullmatch(r"[^:/]+:[^:/]+", word):
            return before
    for before, name, value in zip(["", *words], words, words[1:]):
        given = before == "setenv" or (name.startswith("-") and not _PLAIN.match(value))
        if given and not _LOOKED_UP.match(value) and is_secret(name, value):
            return name
    if "git" not in words and any(map(_is_random, (word for word in words if not _NAMED_BY_HASH.search(word)))):
        return "a token"
    return "a token" if has_token(text) or any(map(_is_base64_key, words)) else None


def _words(text: str) -> list[str]:
    if len(text) > _LONG:  # shlex takes quadratic time
        return text.split()
    try:
        return shlex.split(text)
    except ValueError:  # a quote that does not end
        return text.split()


def _is_hidden(character: str) -> bool:
    return unicodedata.category(character) in _HIDDEN and character not in _JOINERS


def is_unicode(text: str) -> bool:
    """False for a text with lone surrogates, such as a file name or a command-line word whose bytes are not UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def counted(count: int, one: str, many: str = "") -> str:
    """A number with its noun: ``1 row``, ``2 rows``; ``many`` is the plural of a noun that does not take an s."""
    return f"{count} {one if count == 1 else many or one + 's'}"


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
