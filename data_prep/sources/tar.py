"""Members of tar streams, with errors for damage that tarfile ignores."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from typing import Protocol

from data_prep.errors import DataError

BLOCK = 512
_PORTION = 64 << 20
MAX_HEADER = 1 << 20  # bytes of a long name or an extended header
_DIGITS = 19  # of a length in a pax header
GNU_LONG = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
EXTENDED = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.XGLTYPE)
NO_PAYLOAD = (tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE)


class Readable(Protocol):
    """A stream of bytes that is read from front to back."""

    def read(self, count: int, /) -> bytes:
        """The next ``count`` bytes, fewer at the end."""


class TarMembers:
    """Members of a tar stream, in order.

    :mod:`tarfile` parses the headers. It does not walk the archive, because it takes a damaged header, a cut between
    members and a missing end for the end of the archive; each of them is an error here.
    """

    def __init__(self, stream: Readable, path: str):
        self._stream, self._path = stream, path
        self._at = 0  # bytes read
        self._next = 0  # offset of the next header
        self._size = 0  # of the current member's payload

    def payload(self) -> bytes:
        """Read the payload of the current member; call it once."""
        return self._read(self._size)

    def __iter__(self) -> Iterator[tarfile.TarInfo]:
        """Yield members with full names and sizes; ``offset_data`` is the offset of the payload."""
        name: str | None = None  # from the headers before the member
        size: int | None = None
        while (header := self._header()) is not None:
            if header.type in GNU_LONG:
                long = self._meta(header)
                if header.type == tarfile.GNUTYPE_LONGNAME:
                    name = long.rstrip(b"\0").decode("utf-8", "surrogateescape")
                continue
            if header.type in EXTENDED:
                pairs = self._pairs(self._meta(header))
                if header.type == tarfile.XGLTYPE and not pairs.keys().isdisjoint(("path", "size")):
                    raise self._damaged("a global header that names a member")
                name = pairs.get("path", name)
                size = self._number(pairs["size"]) if "size" in pairs else size
                continue
            if name is not None:
                header.name = name.rstrip("/")
            if header.type not in NO_PAYLOAD:
                self._payload_here(header.size if size is None else size)
            header.size, header.offset_data = self._size, self._at
            name = size = None
            yield header
        if name is not None or size is not None:
            raise self._damaged("an extended header without its member")
        self._finish()

    def _header(self) -> tarfile.TarInfo | None:
        """Read the next header; None for the first of the two zero blocks that end an archive."""
        self._pass_by(self._next - self._at)
        block = self._read(BLOCK)
        self._next, self._size = self._at, 0
        if not any(block):
            return None
        try:
            header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except tarfile.HeaderError as error:
            raise self._damaged(str(error)) from None
        if header.size < 0:
            raise self._damaged(f"a member of {header.size} bytes")
        if header.type == tarfile.GNUTYPE_SPARSE:
            raise self._damaged("a sparse member, which cannot be read")
        return header

    def _payload_here(self, size: int) -> None:
        self._size = size
        self._next = self._at + -(-size // BLOCK) * BLOCK

    def _meta(self, header: tarfile.TarInfo) -> bytes:
        """Read the payload of an extended header."""
        if header.size > MAX_HEADER:
            raise self._damaged(f"an extended header of {header.size} bytes")
        self._payload_here(header.size)
        return self._read(header.size)

    def _pairs(self, data: bytes) -> dict[str, str]:
        """Keywords and values of a pax header: repeated ``<length> <keyword>=<value>\\n``."""
        pairs: dict[str, str] = {}
        at, data = 0, data.rstrip(b"\0")
        while at < len(data):  # by offset: cutting the rest off each time would take quadratic time
            space = data.find(b" ", at, at + _DIGITS + 1)
            end = at + self._number(data[at : max(space, at)].decode("latin-1"))
            keyword, equals, value = data[space + 1 : end].partition(b"=")
            if not (equals and value.endswith(b"\n") and space < end <= len(data)):
                raise self._damaged("a pax header that cannot be read")
            pairs[keyword.decode("utf-8", "surrogateescape")] = value[:-1].decode("utf-8", "surrogateescape")
            at = end
        if any(keyword.startswith("GNU.sparse") for keyword in pairs):
            raise self._damaged("a sparse member, which cannot be read")
        return pairs

    def _number(self, digits: str) -> int:
        if not (digits.isascii() and digits.isdecimal() and len(digits) <= _DIGITS):
            raise self._damaged(f"a pax header with the number {digits[:20]!r}")
        return int(digits)

    def _finish(self) -> None:
        """Check the end of the archive; only zeros may follow it."""
        if any(self._read(BLOCK)):
            raise self._damaged("a block of zeros")
        while rest := self._stream.read(1 << 20):
            if rest.count(0) != len(rest):
                raise DataError(
                    f"{self._path}: more data after the end of the archive at byte {self._at}; "
                    "if tars were joined, unpack them and pack them anew"
                )

    def _pass_by(self, count: int) -> None:
        while count > 0:
            count -= len(self._read(min(count, 1 << 20)))

    def _read(self, count: int) -> bytes:
        # In portions: the size that a header states may be more than there is, and than memory holds.
        data = self._stream.read(min(count, _PORTION))
        while len(data) < count and (more := self._stream.read(min(count - len(data), _PORTION))):
            data += more
        self._at += len(data)
        if len(data) < count:
            raise DataError(
                f"{self._path}: the tar is cut: it ends at byte {self._at} (unpacked) without the two zero blocks "
                "that end an archive; fetch the file again"
            )
        return data

    def _damaged(self, what: str) -> DataError:
        return DataError(
            f"{self._path}: damaged tar at the header before byte {self._at} (unpacked): {what}; fetch the file again"
        )
