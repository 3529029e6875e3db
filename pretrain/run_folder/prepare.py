"""Preparation of a run folder for a job: lock, configuration, tokenizer, versions."""

from __future__ import annotations

import fcntl
import os
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from bd3_common.atomic import atomic_file, write_text
from bd3_common.errors import ConfigError
from data_prep.read.stream import RowStream
from pretrain.config.resolve import save_config
from pretrain.config.schema import RunConfig
from pretrain.run_folder import events, layout
from pretrain.run_folder.identity import Identity, read_identity, write_identity

_PACKAGES = ("bd3-megatron", "torch", "megatron-core", "numpy")


def contents(run: Path) -> list[str]:
    """Names that a job decides by where it begins: the run's id and the checkpoints; they change if another job runs.

    Raises:
        ConfigError: the file of the id is damaged.
    """
    found = read_identity(run)
    names = sorted(path.name for path in (run / layout.CHECKPOINTS).glob("*") if path.name[0] != ".")
    return [found.id if found else "", *names]


def prepare(run: Path, config: RunConfig, stream: RowStream, identity: Identity, seen: Sequence[str]) -> int:
    """Make and lock the run folder; write the run's id, configuration, tokenizer and versions.

    Args:
        seen: :func:`contents` when the job chose its checkpoint, before it had the lock.

    Returns:
        the descriptor of the lock.

    Raises:
        ConfigError: another process is training in it, or has been since ``seen``.
    """
    run.mkdir(parents=True, exist_ok=True)
    locked = lock(run)
    if contents(run) != list(seen) or not os.path.samestat(os.fstat(locked), os.stat(run)):
        os.close(locked)
        raise ConfigError(f"run={run}: another process has trained in it just now; start this job again")
    if read_identity(run) != identity:
        write_identity(run, identity)
    events.mend(run)
    tokenizer = run / layout.TOKENIZER
    if not tokenizer.exists():
        with atomic_file(tokenizer) as temporary:
            stream.readers[0].copy_tokenizer(temporary)
    versions = [f"python {platform.python_version()}", *(f"{name} {version(name)}" for name in _PACKAGES)]
    write_text(run / layout.VERSIONS, "\n".join(versions) + "\n")
    save_config(config, run / layout.CONFIG)
    return locked


def lock(run: Path) -> int:
    """Lock a run folder until the descriptor that is returned is closed.

    Raises:
        ConfigError: another process is training in it.
    """
    locked = os.open(run, os.O_RDONLY)
    try:
        fcntl.flock(locked, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(locked)
        raise ConfigError(f"run={run}: another process is training in it; wait for it or use another --run") from None
    return locked
