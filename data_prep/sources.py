"""Reading documents from JSONL, strictly: what cannot be read whole is an error, never a short read."""

from __future__ import annotations

import difflib
import gzip
import json
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

from data_prep.errors import DataError

SUFFIXES = (".jsonl", ".jsonl.gz")


class Document(NamedTuple):
    """One document and where it came from."""

    id: str
    text: str
    source: str  # name of the file
    offset: int  # byte at which its line starts in the (decompressed) file


def expand(paths: Sequence[str | Path]) -> list[Path]:
    """Files behind ``paths``, in the order given; a folder stands for its JSONL files, sorted by name.

    Raises:
        DataError: a path is missing, is not a type we read, or is given twice; a folder holds no JSONL.
    """
    files: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            inside = sorted(p for p in path.iterdir() if p.name.endswith(SUFFIXES) and not p.name.startswith("."))
            if not inside:
                raise DataError(f"{path}: no *.jsonl or *.jsonl.gz in this folder; name the folder that holds the text")
            files += inside
        elif not path.exists():
            raise DataError(f"{path}: no such file or folder; check the path")
        elif not path.is_file() or not path.name.endswith(SUFFIXES):
            raise DataError(
                f"{path}: not a file type that can be read; give .jsonl or .jsonl.gz, one JSON object a line"
            )
        else:
            files.append(path)
    seen: set[Path] = set()
    for file in files:
        if file.resolve() in seen:
            raise DataError(f"{file}: given twice, its documents would count double; name it once")
        seen.add(file.resolve())
    return files


def read_documents(paths: Sequence[str | Path], text_field: str = "text", id_field: str = "id") -> Iterator[Document]:
    """Stream the documents of JSONL files, plain or gzipped, one line in memory at a time.

    Blank lines are skipped. A document without an id is named ``<file name>:<line>``; equal ids are allowed.

    Raises:
        DataError: a path as in :func:`expand`; a file that is cut, corrupt or unreadable; a line that is not
            UTF-8, not JSON or not an object; a text that is missing, blank or not a string.
    """
    for path in expand(paths):
        offset = 0
        for number, line in enumerate(_lines(path), start=1):
            if line.strip():
                identity, text = _parse(line, f"{path}:{number}", offset, text_field, id_field)
                yield Document(identity or f"{path.name}:{number}", text, path.name, offset)
            offset += len(line)


def _lines(path: Path) -> Iterator[bytes]:
    """Lines of the file with their ends, every failure to read turned into a DataError."""
    number = 0
    try:
        with _open(path) as stream:
            for number, line in enumerate(stream, start=1):  # noqa: B007 (used when reading fails)
                yield line
    except EOFError:
        raise DataError(f"{path}: the gzip stream ends early, after line {number}; fetch the file again") from None
    except (gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path}: corrupt gzip after line {number} ({error}); fetch the file again") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error}); check the file and its rights") from None


def _open(path: Path) -> BinaryIO:
    if not path.name.endswith(".gz"):
        return path.open("rb")
    if path.stat().st_size == 0:  # gzip would read it as an empty text
        raise EOFError
    return gzip.open(path, "rb")


def _parse(line: bytes, where: str, offset: int, text_field: str, id_field: str) -> tuple[str, str]:
    """(id or "", text) of one line."""
    try:
        record = json.loads(line.rstrip(b"\r\n").decode())
    except UnicodeDecodeError as error:
        raise DataError(
            f"{where}: not UTF-8 at byte {offset + error.start} of the text "
            f"(0x{line[error.start]:02x}); convert the file to UTF-8"
        ) from None
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not JSON ({error.msg}, column {error.colno}); put one object on each line") from None
    except (ValueError, RecursionError) as error:  # absurdly long numbers or deep nesting
        raise DataError(f"{where}: not JSON that can be read ({error}); put one object on each line") from None
    if not isinstance(record, dict):
        raise DataError(
            f"{where}: a JSON {type(record).__name__}, not an object; write {{{json.dumps(text_field)}: ...}}"
        )
    text = record.get(text_field)
    if not isinstance(text, str):
        raise DataError(f"{where}: {_text_problem(record, text_field, id_field)}")
    if not text.strip():
        raise DataError(f"{where}: field {text_field!r} is empty; remove the document")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: field {text_field!r} holds the lone surrogate \\u{ord(text[error.start]):04x} at "
            f"character {error.start}, which is no text; replace it"
        ) from None
    identity = record.get(id_field)
    if identity is None:
        return "", text
    if isinstance(identity, bool) or not isinstance(identity, str | int):
        raise DataError(
            f"{where}: field {id_field!r} holds a JSON {type(identity).__name__}; "
            "use a string or an integer, or leave it out"
        )
    return str(identity), text


def _text_problem(record: dict, text_field: str, id_field: str) -> str:
    """Say what is wrong with the text field and which field may have been meant."""
    strings = [name for name, value in record.items() if isinstance(value, str) and name != id_field]
    near = difflib.get_close_matches(text_field, strings, n=1)
    likely = near[0] if near else max(strings, key=lambda name: len(record[name]), default=None)
    remedy = f"use --text-field {likely}" if likely else "give every document a text"
    if text_field in record:
        return f"field {text_field!r} holds a JSON {type(record[text_field]).__name__}, not a string; {remedy}"
    return f"no field {text_field!r} among {', '.join(map(repr, record)) or 'none at all'}; {remedy}"
