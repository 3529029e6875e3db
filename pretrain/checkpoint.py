"""Checkpoints that are complete or absent: written aside, checksummed, renamed.

A checkpoint is a folder ``checkpoints/step-00001000`` with torch's distributed checkpoint files and ``complete.json``,
which is written last and lists every file with its size and sha256. A newest checkpoint that does not match its list
is skipped with a warning in favour of the one before.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor

from bd3_megatron.config import ConfigError
from bd3_megatron.engine.base import Engine

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
    dcp.save(engine.state(), checkpoint_id=partial)
    if engine.world.is_first:
        listing = {
            "step": step,
            "meta": meta,
            "files": {p.name: _stamp(p) for p in sorted(partial.iterdir())},
        }
        _write_synced(partial / COMPLETE, json.dumps(listing, indent=1))
        shutil.rmtree(final, ignore_errors=True)
        os.replace(partial, final)
        _sync_folder(folder)
        for old in _folders(run)[:-keep]:
            shutil.rmtree(old, ignore_errors=True)
    dist.barrier()
    return final


def newest(run: Path, warn: Callable[[str], None] = lambda _: None) -> Checkpoint | None:
    """The newest checkpoint whose files match its list, or None if there is none."""
    for path in reversed(_folders(run)):
        problem, listing = _examine(path)
        if problem is None:
            return Checkpoint(path, listing["step"], listing["meta"])
        warn(f"{path}: {problem}; using the checkpoint before it")
    return None


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
    problem, listing = _examine(path)
    if problem is not None:
        raise ConfigError(f"{path}: {problem}; use another step")
    return Checkpoint(path, listing["step"], listing["meta"])


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
    state = {k: torch.empty(v.size, dtype=v.properties.dtype) for k, v in known.items() if k.startswith(section)}
    _load(checkpoint, state, no_dist=True)
    return {name.removeprefix(section): tensor for name, tensor in state.items()}


def _load(checkpoint: Checkpoint, state: dict[str, Tensor], **options: Any) -> None:
    known = dcp.FileSystemReader(checkpoint.path).read_metadata().state_dict_metadata
    for name, tensor in state.items():
        there = known.get(name)
        if there is None or tuple(there.size) != tuple(tensor.shape):
            found = "absent" if there is None else f"of shape {list(there.size)}"
            raise ConfigError(
                f"{checkpoint.path}: {name} is {found}, the configuration asks for {list(tensor.shape)}; "
                f"use the configuration the run was started with"
            )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.load(state, checkpoint_id=checkpoint.path, **options)


def _folders(run: Path) -> list[Path]:
    """Checkpoint folders by ascending step, complete or not."""
    return sorted((run / "checkpoints").glob(f"{_PREFIX}[0-9]*"), key=_step)


def _step(path: Path) -> int:
    return int(path.name.removeprefix(_PREFIX))


def _examine(path: Path) -> tuple[str | None, dict[str, Any]]:
    """What is wrong with a checkpoint (None: nothing), and its list."""
    try:
        listing = json.loads((path / COMPLETE).read_text())
        for name, stamp in listing["files"].items():
            if _stamp(path / name, hashed=False)["bytes"] != stamp["bytes"]:
                return f"{name} has another size than listed", {}
            if _stamp(path / name)["sha256"] != stamp["sha256"]:
                return f"{name} has another checksum than listed", {}
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing", {}
    except (ValueError, KeyError, TypeError):
        return f"{COMPLETE} is unreadable", {}
    return None, listing


def _stamp(path: Path, hashed: bool = True) -> dict[str, Any]:
    """Size and checksum of a file."""
    size = path.stat().st_size
    if not hashed:
        return {"bytes": size}
    with path.open("rb") as file:
        return {"bytes": size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _write_synced(path: Path, text: str) -> None:
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
