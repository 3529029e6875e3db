"""This process's rank, from the variables of torchrun or Slurm; without them a world of 1."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from bd3_common.errors import ConfigError
from slurm.environment import slurm_task

if TYPE_CHECKING:
    import torch.distributed as dist

TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Ranks:
    """Rank and world size of a process, and the address of rank 0."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    master_addr: str = "127.0.0.1"
    master_port: int = 0
    """0: any free port, in a world of 1"""
    launcher: Literal["torchrun", "slurm", "none"] = "none"
    store_served: bool = False
    """the launcher serves the rendezvous store; else rank 0 does"""


def read_ranks(environ: Mapping[str, str] | None = None) -> Ranks:
    """Read the launcher's variables: torchrun's first, then those of a Slurm task, else a world of 1.

    Under Slurm, MASTER_ADDR and MASTER_PORT of the job script take precedence.

    Raises:
        ConfigError: a variable is missing, no number, or contradicts another.
    """
    environ = os.environ if environ is None else environ
    if any(name in environ for name in TORCHRUN[:3]):
        return _torchrun(environ)
    try:
        task = slurm_task(environ)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    if task is None:
        return Ranks()
    host = environ.get("MASTER_ADDR") or task.host
    port = _number(environ, "MASTER_PORT") if environ.get("MASTER_PORT") else task.port
    return Ranks(task.rank, task.world_size, task.local_rank, host, port, "slurm")


def rendezvous(ranks: Ranks) -> dist.Store | None:
    """Rendezvous store of all ranks; None for a world of 1."""
    import torch.distributed as dist

    if ranks.world_size == 1:
        return None
    store = dist.TCPStore(
        ranks.master_addr,
        ranks.master_port,
        ranks.world_size,
        is_master=ranks.rank == 0 and not ranks.store_served,
    )
    # torchrun restarts ranks with the same store, which still has the addresses of those before.
    return dist.PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)


def _torchrun(environ: Mapping[str, str]) -> Ranks:
    missing = [name for name in TORCHRUN if not environ.get(name)]
    if missing:
        there = [name for name in TORCHRUN if environ.get(name)] or ["the launcher's variables"]
        raise ConfigError(
            f"{missing[0]}: not set, though {there[0]} is; start with torchrun, or unset {', '.join(there)}"
        )
    rank, world_size, local_rank = (_number(environ, name) for name in TORCHRUN[:3])
    if rank >= world_size:
        raise ConfigError(f"RANK={rank}: not below WORLD_SIZE={world_size}; start with torchrun")
    if local_rank > rank:
        raise ConfigError(f"LOCAL_RANK={local_rank}: above RANK={rank}; start with torchrun")
    port = _number(environ, "MASTER_PORT")
    served = environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return Ranks(rank, world_size, local_rank, environ["MASTER_ADDR"], port, "torchrun", served)


def _number(environ: Mapping[str, str], name: str) -> int:
    value = environ[name]
    if not (value.isascii() and value.isdigit()):
        raise ConfigError(f"{name}={value}: not a number; start with torchrun or srun")
    if name == "MASTER_PORT" and not 0 < int(value) < 65536:
        raise ConfigError(f"{name}={value}: not a port; use 1 to 65535")
    return int(value)
