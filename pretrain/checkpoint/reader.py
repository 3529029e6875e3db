"""Checkpoint reader: finds complete checkpoints, and reads them into an engine or as whole tensors.

A checkpoint is a folder ``checkpoints/step-00001000`` with files of tensors, their index, and ``complete.json``, which
:mod:`pretrain.checkpoint.writer` writes last; it lists every file with its size and sha256. A checkpoint that does not
match its list is skipped with a warning, and the one before it is used.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bd3_common.errors import ConfigError
from bd3_megatron.engine.base import Engine
from bd3_megatron.engine.scaling import SECTION
from bd3_megatron.hf.files import LazyTensors
from bd3_megatron.parallel import World
from bd3_megatron.shards import Chunk, ShardedTensor, as_parameter
from pretrain.checkpoint.folder import (
    Checkpoint,
    checkpoint_of,
    folder_of,
    folders,
    problem,
    read_listing,
    step_of,
)
from pretrain.checkpoint.index import DTYPES
from pretrain.checkpoint.owner import identity_of
from pretrain.checkpoint.stored import StoredTensors
from pretrain.distributed.collectives import gather_from_ranks, on_rank_0, raise_on_all_ranks
from pretrain.run_folder.identity import Identity
from pretrain.run_folder.layout import CHECKPOINTS

_LOG = logging.getLogger(__name__)
_WEIGHTS, _EMA = "weights", "ema"  # sections of a checkpoint


def newest_checkpoint(run: Path) -> Checkpoint | None:
    """The newest checkpoint of the folder's run whose files match its list; None if there is none.

    A warning names each newer one that does not, or is of another run.
    """
    found, problems = _newest(run)
    if found is not None:
        _warn(problems)
    return found


def _warn(problems: Mapping[Path, str]) -> None:
    for path, reason in problems.items():
        _LOG.warning(f"{path}: {reason}; skipped")


def _newest(run: Path) -> tuple[Checkpoint | None, dict[Path, str]]:
    """The newest checkpoint whose files match its list, and what is wrong with each newer one, newest first."""
    problems: dict[Path, str] = {}
    identity = identity_of(run)
    for path in reversed(folders(run)):
        found = _examine(path, identity)
        if isinstance(found, Checkpoint):
            return found, problems
        problems[path] = found
    return None, problems


def newest_on_all_ranks(
    run: Path,
    world: World,
    usable: Callable[[int, dict[str, Any]], bool] = lambda *_: True,
) -> Checkpoint | None:
    """:func:`newest_checkpoint` with the checksums split over ranks; the same result on every rank.

    Args:
        usable: returns False, from step and meta, for a checkpoint to skip without a warning.
    """
    identity = Identity(**on_rank_0(lambda: identity_of(run).model_dump()))
    for path in reversed(on_rank_0(lambda: folders(run))):
        found = on_rank_0(partial(_list, path, identity))
        if isinstance(found, dict) and not usable(found["step"], found["meta"]):
            continue
        if isinstance(found, dict):
            stamps = found["files"]
            order = sorted(stamps, key=lambda name: (-stamps[name]["bytes"], name))
            mine = {name: stamps[name] for name in order[world.rank :: world.size]}
            problems = gather_from_ranks(partial(problem, path, mine))
            if not any(problems):
                return checkpoint_of(path, found)
            found = next(filter(None, problems))
        _LOG.warning(f"{path}: {found}; skipped")
    return None


def find_checkpoint(run: Path, step: int | None = None) -> Checkpoint:
    """The checkpoint of ``step``, or the newest complete one.

    Raises:
        ConfigError: there is none, it is damaged, or it is of another run than the folder's.
    """
    if not (run / CHECKPOINTS).is_dir():
        raise ConfigError(f"{run}: has no checkpoints; give the folder of a run that bd3 pretrain wrote")
    if step is None:
        found, problems = _newest(run)
        if found is None:
            why = next((f": {path.name}: {reason}" for path, reason in problems.items()), "")
            raise ConfigError(f"{run / CHECKPOINTS}: no complete checkpoint{why}; let bd3 pretrain reach one")
        _warn(problems)
        return found
    path = folder_of(run, step)
    if not path.is_dir():
        there = ", ".join(str(step_of(p)) for p in folders(run)) or "none"
        raise ConfigError(f"step {step}: no checkpoint {path}; there are: {there}")
    found = _examine(path, identity_of(run))
    if not isinstance(found, Checkpoint):
        raise ConfigError(f"{path}: {found}; use another step")
    return found


def restore(checkpoint: Checkpoint, engine: Engine) -> None:
    """Fill the engine's state from a checkpoint, in place.

    Adam's step count continues from ``updates`` of the checkpoint's meta, or from its step where meta has none.
    FP8 scales that the checkpoint lacks, because it was written in bf16 or with another recipe, start anew.

    A checkpoint of weights only, as imports have it, leaves the optimizer's moments at zero and begins an EMA with the
    weights.

    Raises:
        ConfigError: names or shapes of the tensors are not those of this model.
    """
    state = engine.state()
    stored = raise_on_all_ranks(lambda: StoredTensors(checkpoint))
    if checkpoint.meta.get("weights_only"):
        fill_weights(stored, state, f"{_WEIGHTS}/")
        engine.loaded(0)
        return
    scales = {name: sharded for name, sharded in state.items() if name.startswith(f"{SECTION}/")}
    if scales and not _has(stored, scales):
        state = {name: sharded for name, sharded in state.items() if name not in scales}
        _LOG.info(f"{checkpoint.path}: has no FP8 scales of this recipe and history; they start anew")
    raise_on_all_ranks(lambda: _check(stored, state))  # pipeline stages have different tensors
    raise_on_all_ranks(lambda: stored.fill(state))
    engine.loaded(checkpoint.meta.get("updates", checkpoint.step))


def fill_weights(stored: StoredTensors, state: Mapping[str, ShardedTensor], section: str) -> None:
    """Fill the weights and the EMA of an engine's state from one section of a checkpoint.

    Raises:
        ConfigError: names or shapes of the tensors are not those of this model.
    """
    for ours in (f"{_WEIGHTS}/", f"{_EMA}/"):
        renamed = {section + name.removeprefix(ours): x for name, x in state.items() if name.startswith(ours)}
        raise_on_all_ranks(partial(_check, stored, renamed))
        raise_on_all_ranks(partial(stored.fill, renamed))


def weights_section(stored: StoredTensors, averaged: bool) -> str:
    """Section of a checkpoint's EMA weights, if they are wanted and there, else of its weights."""
    wanted = f"{_EMA}/"
    return wanted if averaged and any(name.startswith(wanted) for name in stored.tensors) else f"{_WEIGHTS}/"


def open_weights(checkpoint: Checkpoint, averaged: bool = True) -> LazyTensors:
    """Whole fp32 weights by global parameter name, on the CPU, each read when it is asked for; no process group needed.

    Args:
        averaged: take the EMA weights where the checkpoint has them.

    Raises:
        ConfigError: the checkpoint's index is damaged; at a read, a file of it.
    """
    stored = StoredTensors(checkpoint)
    section = weights_section(stored, averaged)
    names = [name for name in stored.tensors if name.startswith(section)]

    def shape(name: str) -> tuple[int, ...]:
        return tuple(as_parameter(name, torch.empty(stored.tensors[name].shape, device="meta")).shape)

    def read(name: str) -> Tensor:
        return as_parameter(name, _read_tensor(stored, section + name))

    return LazyTensors({name.removeprefix(section): shape(name) for name in names}, read)


def read_weights(checkpoint: Checkpoint, averaged: bool = True) -> dict[str, Tensor]:
    """All of :func:`open_weights`."""
    return dict(open_weights(checkpoint, averaged))


def read_tensors(stored: StoredTensors, section: str) -> dict[str, Tensor]:
    """Whole tensors on the CPU whose names begin with ``section``, by the rest of their names."""
    names = [name for name in stored.tensors if name.startswith(section)]
    return {name.removeprefix(section): _read_tensor(stored, name) for name in names}


def _read_tensor(stored: StoredTensors, name: str) -> Tensor:
    there = stored.tensors[name]
    tensor = torch.empty(there.shape, dtype=DTYPES[there.dtype])
    stored.fill({name: ShardedTensor(tuple(tensor.shape), (Chunk((0,) * tensor.dim(), tensor),))})
    return tensor


def _has(stored: StoredTensors, state: Mapping[str, ShardedTensor]) -> bool:
    return all(name in stored.tensors and stored.tensors[name].shape == state[name].shape for name in state)


def _check(stored: StoredTensors, state: Mapping[str, ShardedTensor]) -> None:
    for name, sharded in state.items():
        there = stored.tensors.get(name)
        if there is None or there.shape != tuple(sharded.shape):
            found = "absent" if there is None else f"of shape {list(there.shape)}"
            raise ConfigError(
                f"{stored.path}: {name} is {found}, the configuration asks for {list(sharded.shape)}; "
                f"use the configuration the run was started with"
            )


def _list(path: Path, identity: Identity) -> dict[str, Any] | str:
    """:func:`read_listing` of a checkpoint of this run, or the problem with it."""
    found = read_listing(path)
    return found if isinstance(found, str) else identity.refusal(found["step"], found["meta"]) or found


def _examine(path: Path, identity: Identity) -> Checkpoint | str:
    """The checkpoint of this run in a folder, or the problem with it."""
    found = _list(path, identity)
    if isinstance(found, str):
        return found
    return problem(path, found["files"]) or checkpoint_of(path, found)
