"""Checkpoint folders on disk: their names, their lists of files, and verification of the files."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bd3_common.atomic import sync, unique_suffix, write_text
from data_prep.format.files import sha256_file
from pretrain.run_folder import layout
from pretrain.run_folder.layout import COMPLETE


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk; ``meta`` is the metadata of the training loop."""

    path: Path
    step: int
    meta: dict[str, Any]


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
    listing = {"step": step_of(final), "meta": meta, "files": {name: files[name] for name in sorted(files)}}
    write_text(partial / COMPLETE, json.dumps(listing, indent=1))
    _rename(partial, final)
    sync(final.parent)


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


def read_listing(path: Path) -> dict[str, Any] | str:
    """Content of ``complete.json`` (step, meta, stamps of the files), or the problem with it."""
    try:
        listing = json.loads((path / COMPLETE).read_text())
        stamps = {name: {"bytes": s["bytes"], "sha256": s["sha256"]} for name, s in listing["files"].items()}
        return {"step": listing["step"], "meta": listing["meta"], "files": stamps}
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{COMPLETE} is unreadable"


def problem(path: Path, stamps: Mapping[str, Any]) -> str | None:
    """Problem with the first of these files that does not match its stamp; None if all match."""
    for name, expected in stamps.items():
        try:
            if (path / name).stat().st_size != expected["bytes"]:
                return f"{name} has another size than listed"
            if stamp(path / name)["sha256"] != expected["sha256"]:
                return f"{name} has another checksum than listed"
        except FileNotFoundError:
            return f"{name} is missing"
    return None


def stamp(path: Path) -> dict[str, Any]:
    """Size and checksum of a file."""
    return {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
