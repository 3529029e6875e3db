"""Byte streams of plain and compressed files: read failures, truncation and corruption raise DataError."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import io
import lzma
import os
import stat
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Protocol

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
XZ_MEMORY = 1 << 31  # bytes; xz -9 takes 65 MiB to unpack
PACKED_CHUNK = 64 << 10  # compressed bytes per call of bz2 and xz, whose output is bounded separately
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
def open_stream(source: Source, local: Path, begin: int = 0) -> Iterator[io.BufferedReader[Any]]:
    """The uncompressed bytes of ``source`` from byte ``begin`` of the file (0 if compressed), read forwards.

    Raises:
        DataError: as :func:`open_checked`; a compressed file is empty; zstandard is missing. Reading raises it for
            a file that is cut, corrupt, unreadable or changed in size.
    """
    with open_checked(source, local) as file:
        if source.compression and not source.bytes:
            raise DataError(f"{source.path}: 0 bytes, so the {source.compression} file is cut; fetch it again")
        if source.compression is None:
            file.seek(begin)
        unpacked = file if source.compression is None else unpack(source, io.BufferedReader(file, BUFFER))
        with io.BufferedReader(_Checked(source, file, unpacked), BUFFER) as stream:
            yield stream


class Unpacked(Protocol):
    """A stream of uncompressed bytes, read forwards."""

    def readinto(self, buffer: WriteableBuffer, /) -> int | None:
        """Fill ``buffer`` from its start; returns the number of bytes, 0 at the end."""


def unpack(source: Source, packed: io.BufferedReader) -> Unpacked:
    """Decompress ``packed``, the stored bytes of a compressed source: all streams or frames, one after another.

    Reading raises EOFError for a stream that is cut, and the library's error for a damaged one.

    Raises:
        DataError: zstandard is missing.
    """
    if source.compression == "gz":
        return gzip.GzipFile(fileobj=packed)
    if source.compression == "zst":
        return _ZstReader(source, packed)
    if source.compression == "bz2":
        return _StreamsReader(packed, bz2.BZ2Decompressor)
    return _StreamsReader(packed, lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ, XZ_MEMORY), padding=b"\0")


def read_head(source: Source, local: Path, count: int) -> bytes:
    """The first ``count`` uncompressed bytes; fewer of a file that ends, is damaged or cannot be opened.

    It raises nothing: reading the documents raises what is wrong with the file.
    """
    head = b""
    with suppress(DataError), open_stream(source, local) as stream:
        while len(head) < count and (chunk := stream.read1(count - len(head))):
            head += chunk
    return head


class _Checked(io.RawIOBase):
    """Raises DataError for every failure of ``unpacked``, and checks the size again at the end."""

    def __init__(self, source: Source, file: io.FileIO, unpacked: Unpacked):
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
        except (gzip.BadGzipFile, zlib.error, lzma.LZMAError, _CorruptStream) as error:
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


class _CorruptStream(Exception):
    """Error of zstandard or bz2 for damaged data."""


class _StreamDecompressor(Protocol):
    """Decompressor of one stream, of :mod:`bz2` or :mod:`lzma`."""

    @property
    def eof(self) -> bool: ...

    @property
    def needs_input(self) -> bool: ...

    @property
    def unused_data(self) -> bytes: ...

    def decompress(self, data: bytes, /, max_length: int = -1) -> bytes: ...


class _StreamsReader(io.RawIOBase):
    """Reader of consecutive bz2 or xz streams. The library's own files ignore whatever follows the first stream and
    does not begin another one, which may be a damaged stream.

    Args:
        make: makes the decompressor of the next stream.
        padding: bytes that may lie between streams.
    """

    def __init__(self, packed: io.BufferedReader, make: Callable[[], _StreamDecompressor], padding: bytes = b""):
        self._file, self._make, self._padding = packed, make, padding
        self._stream = make()
        self._packed = b""  # read and not yet decompressed

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer) -> int:
        target = memoryview(buffer).cast("B")
        while True:
            if self._stream.eof and not self._next():
                return 0
            if self._stream.needs_input and not self._packed:
                self._packed = self._file.read(PACKED_CHUNK)
                if not self._packed:
                    raise EOFError
            try:
                text = self._stream.decompress(self._packed, len(target))
            except (OSError, ValueError) as error:  # of bz2
                raise _CorruptStream(str(error)) from None
            self._packed = b""
            if text:
                target[: len(text)] = text
                return len(text)

    def _next(self) -> bool:
        """Begin the next stream; False at the end of the file."""
        rest = self._stream.unused_data
        while not (rest := rest.lstrip(self._padding) if self._padding else rest):
            if not (rest := self._file.read(PACKED_CHUNK)):
                return False
        self._stream, self._packed = self._make(), rest
        return True


class _ZstReader(io.RawIOBase):
    """Reader of consecutive zstd frames. zstandard's own reader ends at a truncated frame without an error."""

    def __init__(self, source: Source, packed: io.BufferedReader):
        try:
            import zstandard
        except ImportError:
            raise DataError(f"{source.path}: zstandard is needed for .zst and is not installed; {EXTRA}") from None
        self._file = packed
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
            raise _CorruptStream(str(error)) from None
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


def sha256_files(source: Source, paths: Sequence[Path]) -> str:
    """sha256 of the stored bytes of the files, one after another; raises DataError if they cannot be read."""
    try:
        if len(paths) == 1:
            return sha256_file(paths[0])
        digest = hashlib.sha256()
        for path in paths:
            with path.open("rb") as file:
                while chunk := file.read(BUFFER):
                    digest.update(chunk)
        return digest.hexdigest()
    except OSError as error:
        raise DataError(_unreadable(source, error)) from None


def _unreadable(source: Source, error: OSError) -> str:
    return f"{source.path}: cannot be read ({error.strerror or error}); check the file and its rights"
