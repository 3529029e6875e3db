"""JSON files that are not one object a line: an array of objects, or objects that span lines, streamed."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import BinaryIO, Literal

from data_prep.errors import DataError
from data_prep.sources.records import BOM

Layout = Literal["lines", "array", "objects"]
CHUNK = 1 << 20
SPACE = b" \t\r\n"
_STRUCTURE = re.compile(rb'["{}\[\]]')
_SEPARATORS = re.compile(rb'["{}\[\],]')
# Possessive: a long string takes no memory for places to go back to.
_STRING_REST = re.compile(rb'[^"\\]*+(?:\\.[^"\\]*+)*+("?)', re.DOTALL)


def layout_of(head: bytes) -> Layout:
    """Layout of a JSON file that begins with ``head``.

    ``array``: it begins with ``[``, unless the first line is a whole array of anything but objects and others follow.
    ``objects``: the first object goes on in the next line. Otherwise ``lines``, in which a bad line costs one record.
    """
    head = head.removeprefix(BOM).replace(b"\0", b"").lstrip(SPACE)
    first, line_end, rest = head.partition(b"\n")
    if first.startswith(b"["):
        alone = first[1:].lstrip(SPACE).startswith(b"{") or not rest.strip(SPACE)
        return "array" if alone or not first.rstrip(SPACE).endswith(b"]") else "lines"
    if first.startswith(b"{") and line_end and _stays_open(first) and rest.lstrip(SPACE)[:1] in (b'"', b"}"):
        return "objects"
    return "lines"


def _stays_open(line: bytes) -> bool:
    """True if braces or brackets are open at the end of a line, and no string is."""
    depth = place = 0
    while (found := _STRUCTURE.search(line, place)) is not None:
        place = found.end()
        if found[0] == b'"':
            string = _STRING_REST.match(line, place)
            if string is None or not string[1]:
                return False
            place = string.end()
        else:
            depth += 1 if found[0] in b"{[" else -1
    return depth > 0


class JsonValues:
    """Elements of an array, or objects one after another, in a stream that is read once.

    Only braces, brackets, strings and commas are looked at; each element is parsed by its reader. One of more than
    ``limit`` bytes is never in memory whole.

    Args:
        path: names the file in errors.
        array: the stream holds one array; otherwise objects between white space.
    """

    def __init__(self, stream: BinaryIO, path: str, array: bool, limit: int):
        self._stream, self._path, self._array, self._limit = stream, path, array, limit
        self._data = b""
        self._place = 0  # in the data, of what is looked at next
        self._offset = 0  # of the data in the file
        self._parts: list[bytes] = []  # of the current element, before the data
        self._size = 0  # of these, also where they are dropped

    def __iter__(self) -> Iterator[tuple[int, bytes | None]]:
        """Yield (offset, element); None stands for one that is too long.

        Raises:
            DataError: the structure is damaged or cut, so that what follows cannot be told apart.
        """
        for byte in BOM:
            if self._peek() == bytes([byte]):
                self._take(1)
        if self._array:
            yield from self._elements()
        else:
            while self._space():
                if self._peek() != b"{":
                    raise self._damaged("an object must begin")
                yield self._element(b"")
        if self._space():
            raise self._damaged("there is more after the end of the array")

    def _elements(self) -> Iterator[tuple[int, bytes | None]]:
        self._space()
        self._take(1)  # the bracket that the layout was told by
        if not self._space():
            raise self._cut()
        if self._peek() == b"]":
            self._take(1)
            return
        while True:
            if not self._space():
                raise self._cut()
            offset, element = self._element(b",]")
            if element is not None and not element:
                raise self._damaged("an element is missing")
            yield offset, element
            if self._take(1) == b"]":
                return

    def _element(self, ends: bytes) -> tuple[int, bytes | None]:
        """Read an element to its end: before a byte of ``ends``, or behind the closing brace."""
        offset, depth = self._offset + self._place, 0
        self._begin = self._place
        self._parts, self._size = [], 0
        while True:
            pattern = _STRUCTURE if depth else _SEPARATORS
            found = pattern.search(self._data, self._place)
            if found is None:
                self._place = len(self._data)
                self._more()
                continue
            sign = found[0]
            if depth == 0 and sign in (b",", b"]", b"}"):
                if sign not in (ends[:1], ends[1:]):
                    raise self._damaged(f"{sign.decode()} is not expected")
                self._place = found.start()
                return offset, self._collect()
            if depth == 0 and (self._size or found.start() > self._begin):
                raise self._damaged("a comma is missing before the next element")
            self._place = found.end()
            if sign == b'"':
                self._pass_string()
            elif sign in b"{[":
                depth += 1
            else:
                depth -= 1
                if depth == 0 and not ends:
                    return offset, self._collect()

    def _pass_string(self) -> None:
        while True:
            found = _STRING_REST.match(self._data, self._place)
            if found is not None and found[1]:
                self._place = found.end()
                return
            # A backslash at the end belongs to the next byte.
            self._place = len(self._data) if found is None else found.end()
            self._more()

    def _more(self) -> None:
        """Read on within an element, keeping its beginning and what was not looked at yet."""
        chunk = self._stream.read(CHUNK)
        if not chunk:
            raise self._cut()
        done, rest = self._data[self._begin : self._place], self._data[self._place :]
        self._size += len(done)
        if self._size <= self._limit:
            self._parts.append(done)
        else:
            self._parts = []
        self._offset += self._place
        self._data, self._place, self._begin = rest + chunk, 0, 0

    def _collect(self) -> bytes | None:
        last = self._data[self._begin : self._place]
        if self._size + len(last) > self._limit:
            return None
        return b"".join([*self._parts, last]).rstrip(SPACE)

    def _space(self) -> bool:
        """Skip white space and NUL bytes between elements; False at the end of the file."""
        while True:
            while (sign := self._peek()) and sign in b" \t\r\n\0":
                self._place += 1
            return bool(sign)

    def _peek(self) -> bytes:
        if self._place == len(self._data):
            self._offset += len(self._data)
            self._data, self._place = self._stream.read(CHUNK), 0
        return self._data[self._place : self._place + 1]

    def _take(self, count: int) -> bytes:
        self._place += count
        return self._data[self._place - count : self._place]

    def _cut(self) -> DataError:
        return DataError(
            f"{self._path}: the JSON is cut: the file ends at byte {self._offset + len(self._data)} within "
            f"{'its array' if self._array else 'an object'}; fetch the file again"
        )

    def _damaged(self, what: str) -> DataError:
        place = self._offset + self._place
        return DataError(
            f"{self._path}: damaged JSON at byte {place}: {what}; mend it, or write one object on each line"
        )
