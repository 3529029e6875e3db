"""Byte streams of plain and packed files in which every failure is a DataError and a cut is a failure."""

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
# What is given to zstd at once. One block of 128 KB can be packed into 4 bytes, so this bounds what comes back:
# 32 MB, held twice while zstandard joins it.
ZST_PIECE = 1 << 10
ZST_WINDOW = 1 << 31  # bytes; the most that the format's long mode asks for
SKIP = 1 << 20
WHOLE = sys.maxsize  # an end for what is read until there is no more


@contextmanager
def open_checked(source: Source, local: Path) -> Iterator[io.FileIO]:
    """The stored bytes of ``source`` from its copy at ``local``, after a look at its type and size.

    Raises:
        DataError: it cannot be opened, is not a file, or has not the size it was listed with.
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
    """Raise DataError if the open file is not as long as it was when it was listed."""
    size = os.fstat(file.fileno()).st_size
    if size != source.bytes:
        raise DataError(
            f"{source.path}: has {size} bytes now and had {source.bytes} when it was listed; "
            "run again once it is complete"
        )


@contextmanager
def open_stream(source: Source, local: Path, begin: int = 0) -> Iterator[BinaryIO]:
    """The unpacked bytes of ``source`` from byte ``begin`` of the file (packed: 0), to be read forwards.

    Raises:
        DataError: as :func:`open_checked`; a packed file is empty; zstandard is missing. Reading raises it for a
            file that is cut, corrupt, unreadable or changed in size.
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
    """Turns every failure of ``unpacked`` into a DataError, and looks at the size once more at the end."""

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
    """What zstandard says of damaged data."""


class _ZstReader(io.RawIOBase):
    """Frames of zstd one after another. zstandard's own reader takes a frame that is cut for its end."""

    def __init__(self, source: Source, file: io.FileIO):
        try:
            import zstandard
        except ImportError:
            raise DataError(f"{source.path}: zstandard is needed for .zst and is not installed; {EXTRA}") from None
        self._file = io.BufferedReader(file, BUFFER)
        self._error = zstandard.ZstdError
        self._frames = zstandard.ZstdDecompressor(max_window_size=ZST_WINDOW)
        self._frame: ZstdDecompressionObj | None = None  # the one being unpacked
        self._packed = b""  # read and not yet unpacked
        self._text = memoryview(b"")  # unpacked and not yet handed out

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer) -> int:
        target = memoryview(buffer)
        while not self._text:
            self._packed = self._packed or self._file.read(ZST_PIECE)
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
    """(offset, line with its end) for the lines that start at bytes ``begin`` to ``end - 1``.

    ``stream`` stands at byte ``begin - 1``, or at 0 if ``begin`` is 0. A line of more than ``limit`` bytes is not
    held: None comes instead.
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
    """Bytes read up to and with the next line end, or ``enough`` or a few more if there is none so far."""
    skipped = 0
    while skipped < enough and (piece := stream.readline(SKIP)):
        skipped += len(piece)
        if piece.endswith(b"\n"):
            break
    return skipped


def sha256_source(source: Source, local: Path) -> str:
    """sha256 of the stored bytes, packed or not; raises DataError where they cannot be read."""
    try:
        return sha256_file(local)
    except OSError as error:
        raise DataError(_unreadable(source, error)) from None


def _unreadable(source: Source, error: OSError) -> str:
    return f"{source.path}: cannot be read ({error.strerror or error}); check the file and its rights"
