"""Byte streams of plain and compressed files: read failures, truncation and corruption raise DataError."""

from __future__ import annotations

import gzip
import io
import os
import stat
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Protocol

from data_prep.errors import DataError
from data_prep.format.files import sha256_file
from data_prep.sources.inputs import EXTRA, Source

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer
    from zstandard import ZstdDecompressionObj

BUFFER = 1 << 20
# Compressed bytes per call of zstd. A block of 128 KB can compress to 4 bytes, so this bounds the output to 32 MB,
# of which zstandard has two copies in memory while it joins blocks.
ZST_CHUNK = 1 << 10
ZST_WINDOW = 1 << 31  # bytes; largest window of the format's long mode
SKIP = 1 << 20
WHOLE = sys.maxsize  # end of a read to the end of the stream


@contextmanager
def open_checked(source: Source, local: Path) -> Iterator[io.FileIO]:
    """The stored bytes of ``source`` from ``local``, once type and size are checked.

    Raises:
        DataError: it cannot be opened, is not a file, or its size differs from the listing.
    """
    try:
        file = local.open("rb", buffering=0)
    except OSError as error:
        raise DataError(_unreadable(source, error)) from None
    with file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise DataError(f"{source.path}: not a file; name a file")
        check_size(source, file)
        yield file


def check_size(source: Source, file: io.FileIO) -> None:
    """Raise DataError if the size of the open file differs from the listing."""
    size = os.fstat(file.fileno()).st_size
    if size != source.bytes:
        raise DataError(
            f"{source.path}: has {size} bytes now and had {source.bytes} when it was listed; "
            "run again once it is complete"
        )


@contextmanager
def open_stream(source: Source, local: Path, begin: int = 0) -> Iterator[BinaryIO]:
    """The uncompressed bytes of ``source`` from byte ``begin`` of the file (0 if compressed), read forwards.

    Raises:
        DataError: as :func:`open_checked`; a compressed file is empty; zstandard is missing. Reading raises it for
            a file that is cut, corrupt, unreadable or changed in size.
    """
    with open_checked(source, local) as file:
        if source.compression and not source.bytes:
            raise DataError(f"{source.path}: 0 bytes, so the {source.compression} file is cut; fetch it again")
        if source.compression == "gz":
            unpacked: _Readable = gzip.GzipFile(fileobj=io.BufferedReader(file, BUFFER))
        elif source.compression == "zst":
            unpacked = _ZstReader(source, file)
        else:
            file.seek(begin)
            unpacked = file
        with io.BufferedReader(_Checked(source, file, unpacked), BUFFER) as stream:
            yield stream


class _Readable(Protocol):
    def readinto(self, buffer: WriteableBuffer, /) -> int | None: ...


class _Checked(io.RawIOBase):
    """Raises DataError for every failure of ``unpacked``, and checks the size again at the end."""

    def __init__(self, source: Source, file: io.FileIO, unpacked: _Readable):
        self._source, self._file, self._unpacked, self._done = source, file, unpacked, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer) -> int:
        try:
            count = self._unpacked.readinto(buffer) or 0
        except EOFError:
            check_size(self._source, self._file)
            raise DataError(
                f"{self._source.path}: the {self._source.compression} stream ends early, "
                f"after {self._done} unpacked bytes; fetch the file again"
            ) from None
        except (gzip.BadGzipFile, zlib.error, _CorruptZst) as error:
            reason = " ".join(str(error).split())
            raise DataError(
                f"{self._source.path}: corrupt {self._source.compression} after {self._done} unpacked bytes "
                f"({reason}); fetch the file again"
            ) from None
        except OSError as error:
            raise DataError(_unreadable(self._source, error)) from None
        if not count:
            check_size(self._source, self._file)
        self._done += count
        return count


class _CorruptZst(Exception):
    """zstandard's error for damaged data."""


class _ZstReader(io.RawIOBase):
    """Reader of consecutive zstd frames. zstandard's own reader ends at a truncated frame without an error."""

    def __init__(self, source: Source, file: io.FileIO):
        try:
            import zstandard
        except ImportError:
            raise DataError(f"{source.path}: zstandard is needed for .zst and is not installed; {EXTRA}") from None
        self._file = io.BufferedReader(file, BUFFER)
        self._error = zstandard.ZstdError
        self._frames = zstandard.ZstdDecompressor(max_window_size=ZST_WINDOW)
        self._frame: ZstdDecompressionObj | None = None  # being decompressed
        self._packed = b""  # read and not yet decompressed
        self._text = memoryview(b"")  # decompressed and not yet returned

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer) -> int:
        target = memoryview(buffer)
        while not self._text:
            self._packed = self._packed or self._file.read(ZST_CHUNK)
            if not self._packed:
                if self._frame is not None:
                    raise EOFError
                return 0
            self._unpack()
        count = min(len(target), len(self._text))
        target[:count] = self._text[:count]
        self._text = self._text[count:]
        return count

    def _unpack(self) -> None:
        frame = self._frame = self._frame or self._frames.decompressobj()
        try:
            self._text = memoryview(frame.decompress(self._packed))
        except self._error as error:
            raise _CorruptZst(str(error)) from None
        if frame.eof:
            self._packed, self._frame = frame.unused_data, None
        else:
            self._packed = b""


def read_lines(stream: BinaryIO, begin: int, end: int, limit: int) -> Iterator[tuple[int, bytes | None]]:
    """Yield (offset, line with its line end) for the lines that start at bytes ``begin`` to ``end - 1``.

    ``stream`` is at byte ``begin - 1``, or at 0 if ``begin`` is 0. None stands for a line of more than ``limit``
    bytes, which is never in memory whole.
    """
    offset = begin
    if begin:
        offset += _skip_line(stream, end - begin + 1) - 1
    while offset < end:
        line = stream.readline(limit + 1)
        if not line:
            return
        start = offset
        offset += len(line)
        if len(line) <= limit:
            yield start, line
            continue
        if not line.endswith(b"\n"):
            offset += _skip_line(stream, end - offset)
        del line
        yield start, None


def _skip_line(stream: BinaryIO, enough: int) -> int:
    """Skip to the next line end, or at least ``enough`` bytes; returns the bytes skipped."""
    skipped = 0
    while skipped < enough and (chunk := stream.readline(SKIP)):
        skipped += len(chunk)
        if chunk.endswith(b"\n"):
            break
    return skipped


def sha256_source(source: Source, local: Path) -> str:
    """sha256 of the stored bytes; raises DataError if they cannot be read."""
    try:
        return sha256_file(local)
    except OSError as error:
        raise DataError(_unreadable(source, error)) from None


def _unreadable(source: Source, error: OSError) -> str:
    return f"{source.path}: cannot be read ({error.strerror or error}); check the file and its rights"
