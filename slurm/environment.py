"""Slurm's environment variables and host lists: rank, world size and rendezvous address of a task."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from itertools import product
from typing import NamedTuple

from bd3_common.text import shorten

# Step ids from here on are Slurm's own steps (pending, extern, batch, interactive), not started by srun.
FIRST_SPECIAL_STEP = 0xFFFF_FFF0

CHAIN = "BD3_CHAIN"
"""variable of the jobs of a chain: ``<launch> <link> <links>``"""

MAX_TASKS, MAX_HOSTS = 1_000_000, 100_000
"""bounds of what the variables may say"""

FIRST_PORT, PORTS = 10_000, 20_000  # below the range from which Linux hands out ports


class SlurmTask(NamedTuple):
    """One task of a job step."""

    rank: int
    world_size: int
    local_rank: int
    host: str
    """first host of the step: where rank 0 runs"""
    port: int
    """the same for all tasks of a step, different between jobs and steps"""
    hosts: int
    """number of hosts of the step"""


def slurm_task(environ: Mapping[str, str]) -> SlurmTask | None:
    """The task that ``srun`` started with this environment; None outside of one.

    The shell of ``sbatch`` or ``salloc`` is not a task: it has the job's variables, even a SLURM_PROCID, but
    belongs to no step that srun started.

    Raises:
        ValueError: one line that names the variable that is missing or malformed.
    """
    if "SLURM_JOB_ID" not in environ or "SLURM_STEP_ID" not in environ:
        return None
    step = number(environ, "SLURM_STEP_ID")
    if step >= FIRST_SPECIAL_STEP:
        return None
    size = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environ else "SLURM_NTASKS"
    rank, world_size = number(environ, "SLURM_PROCID"), number(environ, size)
    if world_size > MAX_TASKS:
        raise ValueError(f"{size}={world_size}: more than {MAX_TASKS} tasks; start the tasks with srun")
    if rank >= world_size:
        raise ValueError(f"SLURM_PROCID={rank}: not below {size}={world_size}; start the tasks with srun")
    names = ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST")
    nodes = next((name for name in names if environ.get(name)), None)
    if nodes is None:
        raise ValueError("SLURM_STEP_NODELIST: not set, though SLURM_STEP_ID is; start the tasks with srun")
    try:
        hosts = expand_hosts(environ[nodes])
    except ValueError as error:
        raise ValueError(f"{nodes}={error}") from None
    local_rank = number(environ, "SLURM_LOCALID")
    if local_rank > rank:
        raise ValueError(f"SLURM_LOCALID={local_rank}: above SLURM_PROCID={rank}; start the tasks with srun")
    port = FIRST_PORT + (number(environ, "SLURM_JOB_ID") * 31 + step) % PORTS
    return SlurmTask(rank, world_size, local_rank, hosts[0], port, len(hosts))


def number(environ: Mapping[str, str], name: str) -> int:
    """A variable's value as a natural number.

    Raises:
        ValueError: one line that names the variable.
    """
    value = environ.get(name)
    if value is None:
        raise ValueError(f"{name}: not set, though other variables of the launcher are; start the tasks with srun")
    if not re.fullmatch(r"[0-9]{1,18}", value):
        raise ValueError(f"{name}={shorten(value)}: not a number")
    return int(value)


def expand_hosts(hosts: str) -> list[str]:
    """Host names of a Slurm host list: ``"n[01-03,7],login" -> ["n01", "n02", "n03", "n7", "login"]``.

    Raises:
        ValueError: one line, for a malformed list.
    """
    expanded: list[str] = []
    for group in re.split(r",(?![^\[\]]*\])", hosts):  # commas outside of brackets
        parts = re.split(r"\[([^\[\]]*)\]", group)  # text and bracket contents in turn
        if not all(re.fullmatch(r"[\w.-]*", text, re.ASCII) for text in parts[::2]) or not group:
            raise ValueError(f"{shorten(hosts)}: not a host list such as n[01-03,7]")
        choices = [[part] if at % 2 == 0 else _numbers(part, hosts) for at, part in enumerate(parts)]
        if len(expanded) + math.prod(map(len, choices)) > MAX_HOSTS:
            raise ValueError(f"{shorten(hosts)}: more than {MAX_HOSTS} hosts")
        expanded += ["".join(words) for words in product(*choices)]
    return expanded


def _numbers(ranges: str, hosts: str) -> list[str]:
    """``"01-03,7" -> ["01", "02", "03", "7"]``: the width of the lower end is kept."""
    words: list[str] = []
    for part in ranges.split(","):
        match = re.fullmatch(r"(\d{1,18})(?:-(\d{1,18}))?", part, re.ASCII)
        low, high = match.groups() if match else ("1", "0")
        if match is None or int(high or low) < int(low):
            raise ValueError(f"{shorten(hosts)}: [{shorten(ranges)}] is not a list of numbers and ranges")
        if len(words) + int(high or low) - int(low) >= MAX_HOSTS:
            raise ValueError(f"{shorten(hosts)}: more than {MAX_HOSTS} hosts")
        words += [f"{value:0{len(low)}d}" for value in range(int(low), int(high or low) + 1)]
    return words


def compress_hosts(hosts: Iterable[str]) -> str:
    """The Slurm host list of these names, without repetitions: ``["n01", "n02", "n03", "n7"] -> "n[01-03,7]"``.

    The inverse of :func:`expand_hosts`; ranges are formed of the last number of a name.
    """
    groups: dict[tuple[str, ...], list[str]] = {}
    for host in hosts:
        found = re.fullmatch(r"(.*?)([0-9]*)([^0-9]*)", host, re.DOTALL)
        assert found is not None  # every text matches
        head, digits, tail = found.groups()
        groups.setdefault((head, tail) if digits else (host,), []).append(digits)
    return ",".join(head + _ranges(digits) + "".join(tail) for (head, *tail), digits in groups.items())


def _ranges(numbers: Iterable[str]) -> str:
    """``["01", "02", "03", "7"] -> "[01-03,7]"``, and a single one without brackets."""
    ranges: list[tuple[str, str]] = []
    for digits in sorted(set(numbers), key=lambda digits: (int(digits or 0), len(digits))):
        low, high = ranges[-1] if ranges else ("", "")
        if low and digits == f"{int(high) + 1:0{len(low)}d}":
            ranges[-1] = (low, digits)
        else:
            ranges.append((digits, digits))
    words = [low if low == high else f"{low}-{high}" for low, high in ranges]
    return words[0] if len(words) == 1 and "-" not in words[0] else f"[{','.join(words)}]"
