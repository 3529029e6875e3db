"""Options of a Slurm job, and the sbatch directives they stand for."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from bd3_common.text import first_hidden, is_secret, secret_in

_TIME = re.compile(r"\d+(:\d\d?(:\d\d?)?)?|\d+-\d+(:\d\d?){0,2}|UNLIMITED|INFINITE", re.IGNORECASE)
_NAME = re.compile(r"[A-Za-z_]\w*", re.ASCII)
_OPTION = re.compile(r"-{0,2}[A-Za-z][\w-]*(=.*)?", re.ASCII)
_MOST_NODES = 100_000


class JobOptions(BaseModel):
    """Options of sbatch by their own names, and a site's modules, variables and container."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    nodes: str = Field(
        default="1", description="nodes, or a range (2-4): as many as there are; a restart may get others"
    )
    gpus_per_node: int = Field(default=0, ge=0, description="GPUs on each node; 0 trains on CPUs")
    tasks_per_node: int | None = Field(default=None, ge=1, description="ranks on each node; null means one per GPU")
    cpus_per_task: int | None = Field(default=None, ge=1, description="cores of a rank")
    mem: str | None = Field(default=None, description="memory of a node (64G; 0: all)")
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    time: str | None = Field(
        default=None, description="time limit: minutes, H:MM:SS or D-HH:MM:SS; null: the partition's"
    )
    exclude: str | None = Field(default=None, description="nodes not to use: node[3,7-9]")
    dependency: str | None = Field(default=None, description="as of sbatch: afterok:123")
    job_name: str | None = Field(default=None, description="null: the folder's name")
    sbatch: list[str] = Field(
        default=[], description="further options of sbatch, without dashes: exclusive constraint=h100"
    )
    srun: list[str] = Field(
        default=[], description="further options of srun, without dashes: container-image=/images/bd3.sqsh"
    )
    env: dict[str, str] = Field(default={}, description="variables for the job: NCCL_SOCKET_IFNAME ib0")
    setup: list[str] = Field(default=[], description="lines of the shell before the command: 'module load cuda'")
    warn_seconds: int | None = Field(
        default=None,
        ge=1,
        le=65535,
        description="seconds before the time limit at which a run is signalled to write a checkpoint and stop; "
        "null: 300, or a fifth of a shorter limit",
    )
    restarts: int = Field(default=3, ge=0, description="restarts without a new checkpoint after which to give up")

    @field_validator("nodes")
    @classmethod
    def _nodes(cls, value: str) -> str:
        low, high = node_range(value)
        if not 1 <= low <= high <= _MOST_NODES:
            raise ValueError(f"nodes={value}: not a number of nodes or a range of them such as 2-4")
        return value

    @field_validator("time")
    @classmethod
    def _time(cls, value: str | None) -> str | None:
        if value is not None and not _TIME.fullmatch(value):
            raise ValueError(f"time={value}: not a time; use minutes (90), H:MM:SS or D-HH:MM:SS")
        return value

    @field_validator("env")
    @classmethod
    def _env(cls, value: dict[str, str]) -> dict[str, str]:
        for name in value:
            if not _NAME.fullmatch(name):
                raise ValueError(f"env={name}: not the name of a variable")
            if is_secret(name, value[name]):
                raise ValueError(f"env={name}: looks like a secret; {_KEPT}")
        return value

    @field_validator("sbatch", "srun")
    @classmethod
    def _options(cls, value: list[str]) -> list[str]:
        for word in value:
            if not _OPTION.fullmatch(word):
                raise ValueError(f"{word}: not an option; write NAME or NAME=VALUE, each as a word of its own")
        return value

    @model_validator(mode="after")
    def _one_line_each(self) -> JobOptions:
        """Values become lines of a script: a second line of one would be a command."""
        for key, value in _texts(self.model_dump()):
            if found := first_hidden(value, keep="\t" if key == "setup" else ""):
                raise ValueError(f"{key}={value}: has {found}; write it on one line, without control characters")
            if key == "job_name" and "/" in value:
                raise ValueError(f"job_name={value}: has a slash; Slurm writes logs of this name")
            if key in ("setup", "srun", "sbatch") and (found := secret_in(value)):
                raise ValueError(f"{key}: {found} looks like a secret; {_KEPT}")
        return self

    @property
    def ranks(self) -> int:
        """Ranks on each node."""
        return self.tasks_per_node or self.gpus_per_node or 1

    @property
    def node_counts(self) -> range:
        """Node counts that the job may get."""
        low, high = node_range(self.nodes)
        return range(low, high + 1)

    @property
    def warning(self) -> int:
        """Seconds between the warning and the time limit. Slurm may send it up to a minute earlier."""
        if self.warn_seconds is not None:
            return self.warn_seconds
        return 300 if self.time is None else max(1, min(300, seconds_of(self.time) // 5))

    def directives(self) -> dict[str, str | int | None]:
        """Options of sbatch for a run of :attr:`ranks` tasks a node, as :func:`slurm.script.fill` takes them."""
        # Of a node range Slurm gives the fewest nodes that hold the tasks, so their number is left to srun.
        several = len(self.node_counts) > 1
        found: dict[str, str | int | None] = {
            "job-name": self.job_name,
            "nodes": self.nodes,
            "ntasks-per-node": None if several else self.ranks,
            "exclusive": "" if several else None,
            "gpus-per-node": self.gpus_per_node or None,
            "signal": f"USR1@{self.warning}",
        }
        return found | self._common()

    def task_directives(self) -> dict[str, str | int | None]:
        """Options of sbatch for jobs of one task each."""
        return {"job-name": self.job_name, "ntasks": 1} | self._common()

    def _common(self) -> dict[str, str | int | None]:
        found: dict[str, str | int | None] = {
            "cpus-per-task": self.cpus_per_task,
            "mem": self.mem,
            "partition": self.partition,
            "account": self.account,
            "qos": self.qos,
            "time": self.time,
            "exclude": self.exclude,
            "dependency": self.dependency,
        }
        for option in self.sbatch:
            name, _, value = option.lstrip("-").partition("=")
            found[name] = value
        return found


_KEPT = "a script would keep it: export it where bd3 launch is called, Slurm hands it on"


def _texts(values: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Every text of the options, with its option."""
    for key, value in values.items():
        words = [*value, *value.values()] if isinstance(value, dict) else value if isinstance(value, list) else [value]
        yield from ((key, word) for word in words if isinstance(word, str))


def seconds_of(time: str) -> int:
    """Seconds of a time limit in Slurm's notation: minutes, M:SS, H:MM:SS, D-HH, D-HH:MM, D-HH:MM:SS."""
    if not time[0].isdigit():
        return 10**9  # no limit
    days, dash, rest = time.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if dash:
        parts = [*parts, 0, 0][:3]
    elif len(parts) < 3:
        parts = [0, *parts, 0][:3]
    hours, minutes, seconds = parts
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


def node_range(text: str) -> tuple[int, int]:
    """``"2-4" -> (2, 4)``, ``"3" -> (3, 3)``; (0, 0) for anything else."""
    found = re.fullmatch(r"(\d{1,9})(?:-(\d{1,9}))?", text)
    return (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
