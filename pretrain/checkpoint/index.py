"""Index of a checkpoint: its whole tensors by name, and the chunks of which each consists.

An index comes from outside. :func:`check_index` holds it to what a writer makes: chunks that cover each tensor exactly
once, in files that the checkpoint lists.
"""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field

from bd3_common import schema
from bd3_common.atomic import write_text
from bd3_common.errors import ConfigError
from pretrain.checkpoint.folder import FORMAT, FileName, stamp
from pretrain.run_folder.layout import INDEX

REMEDY = "use another step"

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""dtypes by their names in safetensors files"""
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_DIMENSIONS = 6

Size = Annotated[int, Field(ge=1, le=schema.MAX_COUNT)]
Sizes = Annotated[tuple[Size, ...], Field(min_length=1, max_length=_DIMENSIONS)]
Offsets = Annotated[tuple[schema.Count, ...], Field(min_length=1, max_length=_DIMENSIONS)]


class StoredChunk(schema.Record):
    """A chunk on disk.

    Attributes:
        offsets: of its first element in the whole tensor.
        key: its name in ``file``, a safetensors file; in a file of format 1 the place of its first byte.
    """

    offsets: Offsets
    shape: Sizes
    file: FileName
    key: str


class StoredTensor(schema.Record):
    """A whole tensor on disk."""

    shape: Sizes
    dtype: Literal["F32", "F16", "BF16"]
    chunks: list[StoredChunk]


class Index(schema.Record):
    """Content of ``index.json``."""

    format: Annotated[int, Field(ge=FORMAT, le=FORMAT)]
    tensors: dict[str, StoredTensor]


def write_index(folder: Path, parts: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Write ``index.json`` of chunks that are written; returns the stamps of all files.

    Ranks that have the same chunk write the same values; the first of them is named.

    Args:
        parts: every rank's :func:`pretrain.checkpoint.tensor_file.write_chunks`.

    Raises:
        OSError: it cannot be written.
        RuntimeError: the chunks do not cover the tensors.
    """
    tensors: dict[str, Any] = {}
    files: dict[str, Any] = {}
    seen: set[tuple[str, tuple[int, ...]]] = set()
    for part in parts:
        files |= part["files"]
        for name, stored in part["tensors"].items():
            chunks = tensors.setdefault(name, stored | {"chunks": []})["chunks"]
            for chunk in stored["chunks"]:
                place = name, tuple(chunk["offsets"])
                if place not in seen:
                    seen.add(place)
                    chunks.append(chunk)
    path = folder / INDEX
    write_text(path, json.dumps({"format": FORMAT, "tensors": tensors}, separators=(",", ":")))
    try:
        read_index(folder, {name: found["bytes"] for name, found in files.items()})
    except ConfigError as error:
        raise RuntimeError(f"the ranks' chunks are no checkpoint: {error}") from None
    return files | {INDEX: stamp(path)}


def read_index(folder: Path, files: Mapping[str, int]) -> dict[str, StoredTensor]:
    """The checked tensors of ``index.json``.

    Args:
        files: bytes of the files that the checkpoint lists.

    Raises:
        ConfigError: it is damaged.
    """
    path = folder / INDEX
    tensors = schema.read(path, Index, REMEDY, ConfigError).tensors
    check_index(tensors, files, path)
    return tensors


def check_index(tensors: Mapping[str, StoredTensor], files: Mapping[str, int], where: Path) -> None:
    """Check that the chunks cover each tensor exactly, that no two are one, and that they fit into the listed files.

    Raises:
        ConfigError: names the first tensor that does not fit.
    """
    places: set[tuple[str, str]] = set()
    left = dict(files)  # bytes without a chunk
    for name, stored in tensors.items():
        for chunk in stored.chunks:
            if chunk.file not in files:
                raise ConfigError(f"{where}: {name}: {chunk.file} is not listed in complete.json; {REMEDY}")
            if (chunk.file, chunk.key) in places:
                raise ConfigError(f"{where}: {name}: {chunk.key} of {chunk.file} is named twice; {REMEDY}")
            places.add((chunk.file, chunk.key))
            left[chunk.file] -= nbytes(chunk.shape, stored.dtype)
            if left[chunk.file] < 0:
                raise ConfigError(f"{where}: {name}: its chunk does not fit into {chunk.file}; {REMEDY}")
        if not _covers(stored):
            raise ConfigError(f"{where}: {name}: its chunks do not cover the shape {list(stored.shape)}; {REMEDY}")


def nbytes(shape: Iterable[int], dtype: str) -> int:
    """Bytes of a tensor."""
    return math.prod(shape) * DTYPES[dtype].itemsize


def _covers(stored: StoredTensor) -> bool:
    """True if every element is in exactly one chunk.

    How often each point is covered by boxes follows from the boxes' corners, each counted with the sign of its parity
    (the mixed difference of the boxes' indicator functions). So the corners of the chunks must be those of the tensor.
    """
    zero = (0,) * len(stored.shape)
    boxes = [(chunk.offsets, chunk.shape, 1) for chunk in stored.chunks]
    if boxes == [(zero, stored.shape, 1)]:
        return True
    corners: Counter[tuple[int, ...]] = Counter()
    for offsets, shape, sign in [*boxes, (zero, stored.shape, -1)]:
        if len(offsets) != len(zero) or len(shape) != len(zero):
            return False
        for ends in itertools.product((0, 1), repeat=len(zero)):
            corner = tuple(o + n * end for o, n, end in zip(offsets, shape, ends))
            corners[corner] += -sign if sum(ends) % 2 else sign
    return not any(corners.values())
