"""Open shard files: descriptors kept in a least-recently-used order, and reads by ``pread``."""

from __future__ import annotations

import os
import resource
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.errors import DataError
from data_prep.format.files import Identity, identity_of

MOST_OPEN = 4096
"""most files kept open, where the process's limit would allow more"""


class ShardFile:
    """An open file of a known size, which belongs to whoever opened it.

    Args:
        path: the file.
        size: its bytes according to the manifest.
        remedy: end of the error's line, what to do about a file that differs.

    Raises:
        DataError: it is missing, cannot be read, or has another size.
    """

    def __init__(self, path: Path, size: int, remedy: str):
        self.path, self.size, self.remedy = path, size, remedy
        try:
            self._handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            raise DataError(f"{path}: this shard is missing; {remedy}") from None
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror}); check its rights") from None
        found = os.fstat(self._handle)
        self.identity = identity_of(found)
        if found.st_size != size:
            self.close()
            raise DataError(f"{path}: {found.st_size} bytes, the manifest says {size}; {remedy}")

    def read_into(self, out: memoryview, offset: int) -> None:
        """Fill ``out`` (bytes) with the file's bytes from ``offset`` on.

        Raises:
            DataError: the file ends before, because somebody has cut it, or the disk fails.
        """
        try:
            count = os.preadv(self._handle, [out], offset)
            while count < len(out):
                more = os.preadv(self._handle, [out[count:]], offset + count)
                if more == 0:
                    raise DataError(
                        f"{self.path}: ends before byte {offset + len(out)}, the manifest says {self.size} bytes: "
                        f"it was cut while it was in use; {self.remedy}"
                    )
                count += more
        except OSError as error:
            raise DataError(f"{self.path}: cannot be read at byte {offset} ({error.strerror})") from None

    def close(self) -> None:
        """Give the descriptor back."""
        os.close(self._handle)


def bytes_of(array: NDArray[Any]) -> memoryview:
    """The memory of a contiguous array, as bytes to read into."""
    return array.reshape(-1).view(np.uint8).data


class OpenFiles:
    """Files by number, kept open while there is room for them, closed in the order of their last use.

    A file that is unlinked while it is open goes on to be read. One that is opened, or opened again, has to be the file
    that was there when the data set was opened.

    Args:
        paths: path of file ``n``.
        identities: identity of each file when the data set was opened.
        remedy: end of an error's line.
        limit: most files that all objects of this class in the process keep open; by default half of what the process
            may open, and at most MOST_OPEN.
    """

    def __init__(
        self, paths: Callable[[int], Path], identities: Sequence[Identity], remedy: str, limit: int | None = None
    ):
        self._paths, self._identities, self._remedy = paths, identities, remedy
        self._limit = default_limit() if limit is None else limit

    def __len__(self) -> int:
        return sum(owner == id(self) for owner, _ in _OPEN)

    @contextmanager
    def file(self, number: int) -> Iterator[ShardFile]:
        """File ``number``, which stays open in the block.

        Raises:
            DataError: it is missing, has another size than stated, or was replaced since the data set was opened.
        """
        with _LOCK:  # another thread might close it
            found = _OPEN.get((id(self), number))
            if found is None:
                found = self._open(number)
            else:
                _OPEN.move_to_end((id(self), number))
            yield found

    def close(self) -> None:
        """Close all files of this reader."""
        with _LOCK:
            for key in [key for key in _OPEN if key[0] == id(self)]:
                _OPEN.pop(key).close()

    def _open(self, number: int) -> ShardFile:
        while len(_OPEN) >= self._limit:
            _OPEN.popitem(last=False)[1].close()
        _, _, size, _ = self._identities[number]
        found = ShardFile(self._paths(number), size, self._remedy)
        if found.identity != self._identities[number]:
            found.close()
            raise DataError(
                f"{found.path}: was replaced or changed while it was in use; start again if its content is right, else "
                f"{self._remedy}"
            )
        _OPEN[id(self), number] = found
        return found

    def __del__(self) -> None:
        self.close()


# Open files of all readers of the process, least recently used first: train and validation split and all data sets of
# a mix share the limit. The keys are (id of the OpenFiles, number).
_OPEN: OrderedDict[tuple[int, int], ShardFile] = OrderedDict()
_LOCK = threading.RLock()


def default_limit() -> int:
    """Half of the files that this process may open, at most :data:`MOST_OPEN`."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    allowed = MOST_OPEN if soft == resource.RLIM_INFINITY else soft // 2
    return max(1, min(MOST_OPEN, allowed))
