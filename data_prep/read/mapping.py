"""Many files in one stretch of address space, so that rows of all of them are picked by one gather.

A batch of random rows touches nearly as many shards as it has rows. A loop over the shards costs several numpy calls
for each, more than copying the rows themselves. So the address space of all files is reserved at once, each file is
mapped over its place there at first touch, and numpy sees one array. Python's ``mmap`` cannot map to a given
address; the C library's can. Where it cannot be had, files are mapped one by one (:func:`map_file`).
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from data_prep.errors import DataError

# Linux allows a process 65,530 mappings by default; with the gaps between them, files take up to two each.
MOST_MAPPED = 24_000
# Files begin at multiples of this, so that the system may map those it caches in huge pages by huge pages: rows at
# random then cost fewer misses of the address translation. Only address space is lost by it.
PLACE = 2 << 20
# The values of Linux on all machines that Python's mmap does not name.
_MAP_FIXED, _MAP_NORESERVE, _PROT_NONE, _MADV_HUGEPAGE = 0x10, 0x4000, 0, 14


class Stretch:
    """Read-only files, one after another in address space, each mapped when it is asked for.

    Args:
        paths: gives the path of file ``n``.
        sizes: bytes of each file.
        mend: what a wrong size calls for, the end of the error's line.

    Attributes:
        bytes: uint8 ``[stretch]``, all files and the gaps between them. To read where no file is
            mapped ends the process: read only what :meth:`map` has been called for.
        first: int64 ``[files]``, where each file begins in ``bytes``.
        mapped: bool ``[files]``.

    Raises:
        OSError: the system has no such mapping, or not as much address space.
    """

    def __init__(self, paths: Callable[[int], Path], sizes: Sequence[int], mend: str):
        if not sys.platform.startswith("linux") or sys.maxsize < 2**32:
            raise OSError("files are mapped to given addresses on 64-bit Linux only")
        self._paths, self._sizes, self._mend = paths, sizes, mend
        self._mmap, self._madvise = _system_calls()
        self._fits_memory = sum(sizes) <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
        ends = np.cumsum([-(-size // PLACE) * PLACE for size in sizes], dtype=np.int64)
        self.first = np.concatenate([[0], ends[:-1]]).astype(np.int64)
        self.mapped = np.zeros(len(sizes), bool)
        self._order: dict[int, None] = {}  # mapped files, the first mapped first
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
        # Unmapped, with all that lies in it by then, when the last array made from it is gone.
        self._space = mmap.mmap(-1, int(ends[-1]) + PLACE, flags=flags, prot=_PROT_NONE)
        whole = np.frombuffer(self._space, np.uint8)
        self.bytes = whole[-whole.ctypes.data % PLACE :]
        self._address = self.bytes.ctypes.data

    def map(self, numbers: np.ndarray) -> list[int]:
        """Map these files where they are not yet; returns the files unmapped to make place for them.

        Raises:
            DataError: a file is missing or has another size than stated.
        """
        wanted = [int(number) for number in numbers if not self.mapped[number]]
        over = len(self._order) + len(wanted) - MOST_MAPPED
        needed = set(map(int, numbers))
        dropped = [number for number in self._order if number not in needed][: max(over, 0)]
        for number in dropped:
            self._unmap(number)
        for number in wanted:
            with opened(self._paths(number), self._sizes[number], self._mend) as handle:
                self._place(number, mmap.PROT_READ, mmap.MAP_SHARED | _MAP_FIXED, handle)
                self._advise(number)
            self.mapped[number], self._order[number] = True, None
        return dropped

    def _advise(self, number: int) -> None:
        """Have a data set that memory holds read and mapped in huge pages; a larger one is read by the row.

        It is advice: what the system makes of it, or that it knows no such thing, does not matter.
        """
        if self._fits_memory:
            self._madvise(self._address + int(self.first[number]), self._sizes[number], _MADV_HUGEPAGE)

    def _unmap(self, number: int) -> None:
        """Put reserved space back over a file."""
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE | _MAP_FIXED
        self._place(number, _PROT_NONE, flags, -1)
        self.mapped[number] = False
        del self._order[number]

    def _place(self, number: int, protection: int, flags: int, handle: int) -> None:
        address, size = self._address + int(self.first[number]), self._sizes[number]
        if self._mmap(address, size, protection, flags, handle, 0) != address:
            reason = os.strerror(ctypes.get_errno())
            raise DataError(
                f"{self._paths(number)}: cannot be mapped ({reason}); raise vm.max_map_count or the limit of "
                "address space"
            )


def map_file(path: Path, size: int, mend: str) -> np.ndarray:
    """A file of ``size`` bytes as a read-only uint8 array; it stays whole when the file is unlinked.

    Raises:
        DataError: it is missing or has another size.
    """
    with opened(path, size, mend) as handle:
        return np.frombuffer(mmap.mmap(handle, size, prot=mmap.PROT_READ), np.uint8)


@contextmanager
def opened(path: Path, size: int, mend: str):
    """Descriptor of a file, closed at the end; raises DataError unless the file is there with ``size`` bytes."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        raise DataError(f"{path}: this shard is missing; {mend}") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check its rights") from None
    try:
        found = os.fstat(handle).st_size
        if found != size:
            raise DataError(f"{path}: {found} bytes, the manifest says {size}; {mend}")
        yield handle
    finally:
        os.close(handle)


def _system_calls():
    """(mmap, madvise) of the C library."""
    try:
        library = ctypes.CDLL(None, use_errno=True)
        map_, advise = library.mmap, library.madvise
    except (OSError, AttributeError) as error:
        raise OSError(f"the C library's mmap is out of reach ({error})") from None
    address, size, number = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    map_.argtypes = [address, size, number, number, number, ctypes.c_longlong]
    map_.restype = address
    advise.argtypes = [address, size, number]
    return map_, advise
