"""This process's rank, from the variables of torchrun or Slurm; without them a world of 1."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from bd3_common.errors import ConfigError
from bd3_common.text import shorten
from slurm.environment import slurm_task

MAX_RANKS = 1_000_000
LOOPBACK = "127.0.0.1"
RESTARTS = "TORCHELASTIC_RESTART_COUNT"
_DIGITS = 9
_LONGEST_HOST = 253  # characters of a name in DNS
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
    one_machine: bool = False
    """all ranks are known to run on one machine"""
    job: str = ""
    """the launcher's name of the job, the same on all ranks"""
    restart: int = 0
    """number of the launcher's restarts of these ranks"""

    @property
    def name(self) -> str:
        """Name of this start of the job, the same on all ranks."""
        return f"{self.job}, port {self.master_port}, start {self.restart}, {self.world_size} ranks"

    @property
    def short_name(self) -> str:
        """Digest of :attr:`name`, for file names."""
        return hashlib.sha256(self.name.encode()).hexdigest()[:12]

    @property
    def serves_store(self) -> bool:
        """True for the rank that serves the rendezvous store."""
        return self.rank == 0 and not self.store_served and self.world_size > 1


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
    one = task.hosts == 1
    host = _host(environ) if environ.get("MASTER_ADDR") else LOOPBACK if one else task.host
    port = _port(environ) if environ.get("MASTER_PORT") else task.port
    job = f"Slurm {environ['SLURM_JOB_ID']}.{environ['SLURM_STEP_ID']}"
    return Ranks(task.rank, task.world_size, task.local_rank, host, port, "slurm", one_machine=one, job=job)


def _torchrun(environ: Mapping[str, str]) -> Ranks:
    missing = [name for name in TORCHRUN if not environ.get(name)]
    if missing:
        there = [name for name in TORCHRUN if environ.get(name)] or ["the launcher's variables"]
        raise ConfigError(
            f"{missing[0]}: not set, though {there[0]} is; start with torchrun, or unset {', '.join(there)}"
        )
    rank, world_size, local_rank = (_number(environ, name) for name in TORCHRUN[:3])
    if not 0 < world_size <= MAX_RANKS:
        raise ConfigError(f"WORLD_SIZE={world_size}: not a number of ranks from 1 to {MAX_RANKS}")
    if rank >= world_size:
        raise ConfigError(f"RANK={rank}: not below WORLD_SIZE={world_size}; start with torchrun")
    if local_rank > rank:
        raise ConfigError(f"LOCAL_RANK={local_rank}: above RANK={rank}; start with torchrun")
    here = _number(environ, "LOCAL_WORLD_SIZE") if environ.get("LOCAL_WORLD_SIZE") else None
    if here is not None and not local_rank < here <= world_size:
        raise ConfigError(
            f"LOCAL_WORLD_SIZE={here}: not above LOCAL_RANK={local_rank} and at most WORLD_SIZE={world_size}; "
            "start with torchrun"
        )
    host = _host(environ)
    served = environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    restart = _number(environ, RESTARTS) if environ.get(RESTARTS) else 0
    return Ranks(
        rank,
        world_size,
        local_rank,
        host,
        _port(environ),
        "torchrun",
        served,
        one_machine=here == world_size or host in (LOOPBACK, "::1", "localhost"),
        job=environ.get("TORCHELASTIC_RUN_ID", ""),
        restart=restart,
    )


def _number(environ: Mapping[str, str], name: str) -> int:
    value = environ[name]
    if not (value.isascii() and value.isdigit()):
        raise ConfigError(f"{name}={shorten(value)}: not a number; start with torchrun or srun")
    if len(value) > _DIGITS:
        raise ConfigError(f"{name}={shorten(value)}: a number of {len(value)} digits; start with torchrun or srun")
    return int(value)


def _port(environ: Mapping[str, str]) -> int:
    port = _number(environ, "MASTER_PORT")
    if not 0 < port < 65536:
        raise ConfigError(f"MASTER_PORT={port}: not a port; use 1 to 65535")
    return port


def _host(environ: Mapping[str, str]) -> str:
    host = environ["MASTER_ADDR"]
    if len(host) > _LONGEST_HOST or not re.fullmatch(r"[\w.:%-]+", host, re.ASCII):
        raise ConfigError(f"MASTER_ADDR={shorten(host)}: not a host name or address; give that of rank 0")
    return host
