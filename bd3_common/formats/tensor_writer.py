"""Writer of safetensors files, one tensor at a time, from memory that the caller owns."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bd3_common.formats.tensor_header import METADATA, WIDTHS

_BUFFER = 16 << 20
"""bytes that are written at a time"""


class TensorEntry(NamedTuple):
    """A tensor to write; ``dtype`` is a name of :data:`bd3_common.formats.tensor_header.WIDTHS`."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Bytes of its values."""
        return math.prod(self.shape) * WIDTHS[self.dtype]


def write_tensors(
    path: Path, entries: Sequence[TensorEntry], values: Iterable[Any], metadata: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Write and sync a new file.

    Args:
        values: the tensors' values as buffers of bytes, in the order of ``entries``; taken one at a time.
        metadata: texts in the header; by default the one that says that torch wrote the file.

    Returns:
        ``bytes`` and ``sha256`` of the file.

    Raises:
        OSError: it exists or cannot be written.
        ValueError: the values have another number of bytes than announced.
    """
    header: dict[str, Any] = {METADATA: {"format": "pt"} if metadata is None else dict(metadata)}
    begin = 0
    for entry in entries:
        end = begin + entry.bytes
        header[entry.name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # aligns the values
    digest, size = hashlib.sha256(), 0
    with path.open("xb", buffering=0) as file:
        for data in itertools.chain([len(text).to_bytes(8, "little"), text], values):
            view = memoryview(data)
            for first in range(0, len(view), _BUFFER):
                part = view[first : first + _BUFFER]
                digest.update(part)
                size += len(part)
                while len(part):
                    part = part[file.write(part) :]
        os.fsync(file.fileno())
    if size != 8 + len(text) + begin:
        raise ValueError(f"{path}: {size} bytes of tensors, {8 + len(text) + begin} are announced")
    return {"bytes": size, "sha256": digest.hexdigest()}
