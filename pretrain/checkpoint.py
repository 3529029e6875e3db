"""Checkpoints that are complete or absent: written aside, checksummed, renamed.

A checkpoint is a folder ``checkpoints/step-00001000`` with torch's distributed checkpoint files and ``complete.json``,
which is written last and lists every file with its size and sha256. A newest checkpoint that does not match its list
is skipped with a warning in favour of the one before.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from bd3_megatron.config import ConfigError
from bd3_megatron.engine.base import Engine
from bd3_megatron.shards import Held, Piece
from data_prep.manifest import sha256_file
from data_prep.shards import sync
from pretrain.pieces import LoadPieces, SavePieces

COMPLETE = "complete.json"
_PREFIX = "step-"


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk. ``meta`` is what the training loop stored beside the tensors."""

    path: Path
    step: int
    meta: dict[str, Any]


def save(run: Path, engine: Engine, step: int, meta: dict[str, Any], keep: int) -> Path:
    """Write the engine's state as the checkpoint of ``step``; then remove all but the newest ``keep``.

    Every rank calls it. Rank 0 writes the list of files once all ranks have written theirs.

    Raises:
        OSError: the disk is full or not writable; what was there before stays.
    """
    folder = run / "checkpoints"
    partial, final = folder / f".{_PREFIX}{step:08d}.partial", folder / f"{_PREFIX}{step:08d}"
    if engine.world.is_first:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier()
    try:
        with _plain_errors(final):
            dcp.save(engine.state(), checkpoint_id=partial, planner=SavePieces())
        if engine.world.is_first:
            listing = {
                "step": step,
                "meta": meta,
                "files": {p.name: _stamp(p) for p in sorted(partial.iterdir())},
            }
            (partial / COMPLETE).write_text(json.dumps(listing, indent=1))
            sync(partial / COMPLETE)
            shutil.rmtree(final, ignore_errors=True)
            os.replace(partial, final)
            sync(folder)
    except BaseException:
        if engine.world.is_first:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    if engine.world.is_first:
        # A checkpoint of a later step is one that was passed over as damaged: it must not push out a good one.
        for old in [path for path in _folders(run) if _step(path) <= step][:-keep]:
            shutil.rmtree(old, ignore_errors=True)
    dist.barrier()
    return final


@contextlib.contextmanager
def _plain_errors(path: Path) -> Iterator[None]:
    """Raise what failed on the first failing rank, not torch's wrapper around it, which is no Exception."""
    try:
        yield
    except CheckpointException as error:
        cause = next(iter(error.failures.values()))[0]
        if isinstance(cause, OSError) and cause.filename is None:
            cause.filename = str(path)
        if isinstance(cause, RuntimeError) and "inline_container" in str(cause):
            # torch's archive writer lost the system's error and found its file shorter than it should be.
            cause = OSError(errno.EIO, "some of it is missing; is the disk full?", str(path))
        raise cause from error


def newest(run: Path, warn: Callable[[str], None] = lambda _: None) -> Checkpoint | None:
    """The newest checkpoint whose files match its list, or None if there is none."""
    for path in reversed(_folders(run)):
        found = _examine(path)
        if isinstance(found, Checkpoint):
            return found
        warn(f"{path}: {found}; skipped")
    return None


def exists(run: Path) -> bool:
    """Whether the run has any checkpoint, whole or not."""
    return bool(_folders(run))


def find(run: Path, step: int | None = None) -> Checkpoint:
    """The checkpoint of ``step``, or the newest complete one.

    Raises:
        ConfigError: there is none, or it is damaged.
    """
    if not (run / "checkpoints").is_dir():
        raise ConfigError(f"{run}: holds no checkpoints; give the folder of a run that bd3 pretrain wrote")
    if step is None:
        found = newest(run)
        if found is None:
            raise ConfigError(f"{run}/checkpoints: no complete checkpoint; let bd3 pretrain reach one")
        return found
    path = run / "checkpoints" / f"{_PREFIX}{step:08d}"
    if not path.is_dir():
        there = ", ".join(str(_step(p)) for p in _folders(run)) or "none"
        raise ConfigError(f"step {step}: no checkpoint {path}; there are: {there}")
    found = _examine(path)
    if not isinstance(found, Checkpoint):
        raise ConfigError(f"{path}: {found}; use another step")
    return found


def restore(checkpoint: Checkpoint, engine: Engine) -> None:
    """Fill the engine's state from a checkpoint, in place.

    Raises:
        ConfigError: the checkpoint holds other tensors than this model has.
    """
    _load(checkpoint, engine.state())
    engine.loaded(checkpoint.step)


def read_weights(checkpoint: Checkpoint, averaged: bool = True) -> dict[str, Tensor]:
    """Whole fp32 weights by global parameter name, on the CPU; needs no process group.

    Args:
        averaged: take the EMA weights where the checkpoint has them.
    """
    known = dcp.FileSystemReader(checkpoint.path).read_metadata().state_dict_metadata
    section = "ema/" if averaged and any(name.startswith("ema/") for name in known) else "weights/"
    tensors = {k: torch.empty(v.size, dtype=v.properties.dtype) for k, v in known.items() if k.startswith(section)}
    state = {k: Held(tuple(t.shape), (Piece((0,) * t.dim(), t),)) for k, t in tensors.items()}
    _load(checkpoint, state, no_dist=True)
    # Fused gate and up projections are stored as [2, ffn, h].
    return {name.removeprefix(section): t.flatten(0, 1) if t.dim() == 3 else t for name, t in tensors.items()}


def _load(checkpoint: Checkpoint, state: dict[str, Held], **options: Any) -> None:
    known = dcp.FileSystemReader(checkpoint.path).read_metadata().state_dict_metadata
    for name, held in state.items():
        there = known.get(name)
        if there is None or tuple(there.size) != held.shape:
            found = "absent" if there is None else f"of shape {list(there.size)}"
            raise ConfigError(
                f"{checkpoint.path}: {name} is {found}, the configuration asks for {list(held.shape)}; "
                f"use the configuration the run was started with"
            )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.load(state, checkpoint_id=checkpoint.path, planner=LoadPieces(), **options)


def _folders(run: Path) -> list[Path]:
    """Checkpoint folders by ascending step, complete or not."""
    found = (run / "checkpoints").glob(f"{_PREFIX}*")
    return sorted((path for path in found if path.name.removeprefix(_PREFIX).isdecimal()), key=_step)


def _step(path: Path) -> int:
    return int(path.name.removeprefix(_PREFIX))


def _examine(path: Path) -> Checkpoint | str:
    """The checkpoint in a folder, or what is wrong with it."""
    try:
        listing = json.loads((path / COMPLETE).read_text())
        for name, stamp in listing["files"].items():
            if (path / name).stat().st_size != stamp["bytes"]:
                return f"{name} has another size than listed"
            if _stamp(path / name)["sha256"] != stamp["sha256"]:
                return f"{name} has another checksum than listed"
        return Checkpoint(path, listing["step"], listing["meta"])
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (ValueError, KeyError, TypeError):
        return f"{COMPLETE} is unreadable"


def _stamp(path: Path) -> dict[str, Any]:
    """Size and checksum of a file."""
    return {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
