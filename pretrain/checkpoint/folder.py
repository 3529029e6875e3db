"""Checkpoint folders on disk: their names, their lists of files, and verification of the files."""

from __future__ import annotations

import json
import os
import shutil
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field

from bd3_common import schema
from bd3_common.atomic import sync, unique_suffix, write_text
from bd3_common.errors import UserError
from data_prep.format.files import sha256_file
from pretrain.distributed.wire_types import crosses_ranks
from pretrain.run_folder import layout
from pretrain.run_folder.layout import COMPLETE

FORMAT = 2
"""format of the checkpoints that are written; format 1 are those of torch's distributed checkpoint"""

FileName = Annotated[str, Field(pattern=r"^[^/\\\x00]{1,255}$")]


@crosses_ranks
@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk.

    Attributes:
        meta: metadata of the training loop.
        format: 1 for torch's distributed checkpoint, 2 for safetensors files.
        files: bytes of its files.
    """

    path: Path
    step: int
    meta: dict[str, Any]
    format: int
    files: dict[str, int]


def checkpoint_of(path: Path, listing: Mapping[str, Any]) -> Checkpoint:
    """The checkpoint in a folder, from the content of its ``complete.json``."""
    sizes = {name: stamp["bytes"] for name, stamp in listing["files"].items()}
    return Checkpoint(path, listing["step"], listing["meta"], listing["format"], sizes)


def folder_of(run: Path, step: int) -> Path:
    """Folder of the checkpoint of ``step``."""
    return run / layout.CHECKPOINTS / layout.checkpoint_name(step)


def partial_of(run: Path, step: int, writer: str) -> Path:
    """Partial folder into which ``writer`` writes it; one per job, because ranks of a dying job may still write."""
    return run / layout.CHECKPOINTS / layout.partial_checkpoint_name(step, writer)


def folders(run: Path) -> list[Path]:
    """Checkpoint folders by ascending step, complete or not."""
    steps = {path: layout.checkpoint_step(path.name) for path in (run / layout.CHECKPOINTS).glob("*")}
    return sorted((path for path, step in steps.items() if step is not None), key=step_of)


def newest_complete(run: Path) -> Path | None:
    """Folder of the newest complete checkpoint, its files not verified; None if there is none."""
    return next((path for path in reversed(folders(run)) if (path / COMPLETE).is_file()), None)


def step_of(path: Path) -> int:
    """Step in a checkpoint folder's name."""
    step = layout.checkpoint_step(path.name)
    if step is None:
        raise ValueError(f"{path}: not the name of a checkpoint folder")
    return step


def start(partial: Path) -> None:
    """Create the partial folder, and remove those of killed writers."""
    for left in partial.parent.glob(".*"):
        if layout.is_partial_checkpoint(left.name):
            shutil.rmtree(left, ignore_errors=True)
    partial.mkdir(parents=True)


def publish(partial: Path, final: Path, meta: Mapping[str, Any], files: Mapping[str, Any]) -> None:
    """Write the list of files, rename the folder to its final name, and sync both.

    Args:
        files: stamps (:func:`stamp`) by name.
    """
    write_text(partial / COMPLETE, listing_text(step_of(final), meta, files))
    _rename(partial, final)
    sync(final.parent)


def listing_text(step: int, meta: Mapping[str, Any], files: Mapping[str, Any]) -> str:
    """The text of ``complete.json``."""
    stamps = {name: files[name] for name in sorted(files)}
    return json.dumps({"format": FORMAT, "step": step, "meta": meta, "files": stamps}, indent=1, allow_nan=False)


def _rename(partial: Path, final: Path) -> None:
    if not final.exists():
        os.replace(partial, final)
        return
    # The existing checkpoint was skipped as damaged, or the same step is written again.
    aside = partial.with_name(layout.partial_checkpoint_name(step_of(final), f"{unique_suffix()}.replaced"))
    os.replace(final, aside)
    os.replace(partial, final)
    shutil.rmtree(aside, ignore_errors=True)


def retire(run: Path, step: int, keep: int, keep_every: int) -> None:
    """Remove checkpoints up to ``step``, except the newest ``keep`` and those of every ``keep_every``-th step.

    Later checkpoints were skipped as damaged and do not count towards ``keep``.
    """
    for old in [path for path in folders(run) if step_of(path) <= step][:-keep]:
        if not (keep_every and step_of(old) % keep_every == 0):
            shutil.rmtree(old, ignore_errors=True)


class Stamp(schema.Record):
    """Size and checksum of a file."""

    bytes: schema.Count
    sha256: schema.Sha256


class Meta(schema.Record):
    """Metadata of the training loop: types of the keys that are known here; there may be others."""

    model_config = ConfigDict(extra="allow")

    tokens: schema.Count = 0
    rows: schema.Count = 0
    updates: schema.Count = 0
    skips: schema.Count = 0
    data_positions: list[schema.Count] = Field(default=[])
    seed: int = 0
    order_seed: int = 0
    order: str = ""
    beta: float = 0.0
    omega: float = 0.0
    data: str = ""
    imported_from: str = ""
    weights_only: bool = False
    run: str = ""
    settings: dict[str, Any] = Field(default={})
    records: schema.Count = 0
    record_bytes: schema.Count = 0


class _Listing(schema.Record):
    """Content of ``complete.json``."""

    format: Annotated[int, Field(ge=1, le=FORMAT)] = 1
    step: schema.Count
    meta: Meta
    files: dict[FileName, Stamp]


def read_listing(path: Path) -> dict[str, Any] | str:
    """Content of ``complete.json`` (format, step, meta, stamps of the files), or the problem with it."""
    try:
        found = schema.parse(schema.read_bytes(path / COMPLETE), _Listing, COMPLETE)
        there = {entry.name for entry in os.scandir(path)}
    except FileNotFoundError:
        return f"{COMPLETE} is missing"
    except UserError as error:
        return str(error)
    except OSError as error:
        return f"{COMPLETE} cannot be read: {error.strerror}"
    if found.step != step_of(path):
        return f"{COMPLETE} is that of step {found.step}"
    index, suffix = (layout.INDEX, layout.TENSORS) if found.format > 1 else (layout.OLD_INDEX, layout.OLD_TENSORS)
    if index not in found.files:
        return f"{index} is not listed in {COMPLETE}"
    foreign = sorted(name for name in found.files if name != index and not name.endswith(suffix))
    if foreign:
        return f"{COMPLETE} lists {foreign[0]}, which is no file of its format"
    # An upgrade that was killed may leave files of the other format, which are not read.
    unlisted = sorted(name for name in there - set(found.files) if name == index or name.endswith(suffix))
    if unlisted:
        return f"{unlisted[0]} is not listed in {COMPLETE}"
    stamps = {name: one.model_dump() for name, one in found.files.items()}
    return {
        "format": found.format,
        "step": found.step,
        "meta": found.meta.model_dump(exclude_unset=True),
        "files": stamps,
    }


def problem(path: Path, stamps: Mapping[str, Any]) -> str | None:
    """Problem with the first of these files that does not match its stamp; None if all match."""
    for name, expected in stamps.items():
        try:
            status = (path / name).stat()
            if not stat.S_ISREG(status.st_mode):
                return f"{name} is not a regular file"
            if status.st_size != expected["bytes"]:
                return f"{name} has another size than listed"
            if stamp(path / name)["sha256"] != expected["sha256"]:
                return f"{name} has another checksum than listed"
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as error:
            return f"{name} cannot be read: {error.strerror}"
    return None


def stamp(path: Path) -> dict[str, Any]:
    """Size and checksum of a file."""
    return {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
