"""Upgrade of a run's checkpoints of format 1 to the present format, in place.

The new files are written into a partial folder beside the checkpoint, read back, and moved into it. The new
``complete.json``, which replaces the old one atomically, makes them the checkpoint; then the old files are removed. So
an upgrade that is killed leaves the old checkpoint or the new one, and the next one does what is left to do.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bd3_common.atomic import sync, write_text
from bd3_common.errors import ConfigError
from pretrain.checkpoint import folder
from pretrain.checkpoint.index import DTYPES, StoredChunk, write_index
from pretrain.checkpoint.old_format import OldFile
from pretrain.checkpoint.stored import StoredTensors
from pretrain.checkpoint.tensor_file import ChunkEntry, TensorFile, write_chunks
from pretrain.run_folder import layout

_WRITER = ".upgrade"  # end of the writer's name in a partial folder


@dataclass(frozen=True)
class Upgraded:
    """Outcome for one checkpoint.

    Attributes:
        action: ``upgraded``, ``to upgrade``, ``in the present format``, ``cleaned`` of what a killed upgrade left.
        problem: the checkpoint is damaged and stays as it is; else None.
    """

    path: Path
    action: str
    problem: str | None = None


def upgrade_checkpoints(run: Path, dry_run: bool = False) -> Iterator[Upgraded]:
    """Upgrade a run's checkpoints, oldest first.

    Raises:
        ConfigError: the folder has no checkpoints.
        OSError: one cannot be written; it stays as it was.
    """
    paths = folder.folders(run)
    if not paths:
        raise ConfigError(f"{run}: has no checkpoints; give the folder of a run that bd3 pretrain wrote")
    for left in (run / layout.CHECKPOINTS).glob(f".*{_WRITER}*"):
        if layout.is_partial_checkpoint(left.name) and not dry_run:
            shutil.rmtree(left, ignore_errors=True)
    for path in paths:
        listing = folder.read_listing(path)
        damage = listing if isinstance(listing, str) else folder.problem(path, listing["files"])
        if isinstance(listing, str) or damage:
            yield Upgraded(path, "damaged", damage)
            continue
        if listing["format"] == folder.FORMAT:
            left = _old_files(path)
            yield Upgraded(path, "cleaned" if left else "in the present format")
            if not dry_run:
                _remove(path, left)
            continue
        try:
            stored = StoredTensors(folder.checkpoint_of(path, listing))
            if not dry_run:
                _upgrade(stored, listing)
        except ConfigError as error:
            yield Upgraded(path, "damaged", str(error).removeprefix(f"{path}{os.sep}"))
            continue
        yield Upgraded(path, "to upgrade" if dry_run else "upgraded")


def _upgrade(stored: StoredTensors, listing: Mapping[str, Any]) -> None:
    path = stored.path
    partial = path.with_name(layout.partial_checkpoint_name(listing["step"], f"{os.urandom(3).hex()}{_WRITER}"))
    partial.mkdir()
    try:
        files = sorted({chunk.file for tensor in stored.tensors.values() for chunk in tensor.chunks})
        parts = [_rewrite(stored, file, partial / layout.tensors_name(number)) for number, file in enumerate(files)]
        stamps = write_index(partial, parts)
        for name in stamps:
            os.replace(partial / name, path / name)
        sync(path)
        write_text(path / layout.COMPLETE, folder.listing_text(listing["step"], listing["meta"], stamps))
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    _remove(path, _old_files(path))


def _rewrite(stored: StoredTensors, file: str, new: Path) -> dict[str, Any]:
    """Write the chunks of an old file into a new one, one at a time, and read them back.

    Raises:
        OSError: it cannot be written, or does not read back.
    """
    found = [
        (ChunkEntry(name, tensor.dtype, tensor.shape, chunk.offsets, chunk.shape), chunk)
        for name, tensor in stored.tensors.items()
        for chunk in tensor.chunks
        if chunk.file == file
    ]
    old_chunks = [(chunk, entry.dtype) for entry, chunk in found]
    new_chunks = [(StoredChunk(**entry.place, file=new.name, key=entry.key), entry.dtype) for entry, _ in found]
    with stored.open(file) as old:
        part = write_chunks(new, [entry for entry, _ in found], _values(old, old_chunks))
        with TensorFile(new) as written:
            for ours, theirs in zip(_values(written, new_chunks), _values(old, old_chunks), strict=True):
                if not torch.equal(*(x.view(-1).view(torch.uint8) for x in (ours, theirs))):  # NaN equals itself
                    raise OSError(errno.EIO, "does not read back as it was written; check the disk", str(new))
    return part


def _values(file: OldFile | TensorFile, chunks: Iterable[tuple[StoredChunk, str]]) -> Iterator[Tensor]:
    for chunk, dtype in chunks:
        tensor = torch.empty(chunk.shape, dtype=DTYPES[dtype])
        file.read(chunk, dtype, (0,) * len(chunk.shape), tensor)
        yield tensor


def _old_files(path: Path) -> list[Path]:
    """Files of format 1 in a checkpoint's folder."""
    return sorted(p for p in path.iterdir() if p.name == layout.OLD_INDEX or p.name.endswith(layout.OLD_TENSORS))


def _remove(path: Path, files: Sequence[Path]) -> None:
    for file in files:
        file.unlink(missing_ok=True)
    if files:
        sync(path)
