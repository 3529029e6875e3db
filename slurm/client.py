"""Client of Slurm's commands (sbatch, scontrol, sinfo, sacct): parses their output, raises one-line errors."""

from __future__ import annotations

import logging
import re
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from bd3_common.errors import UserError
from bd3_common.text import shorten
from slurm.environment import expand_hosts

log = logging.getLogger(__name__)

TIMEOUT = 60.0  # seconds that a command may take: a busy controller answers slowly
RUNNING = {"RUNNING", "SIGNALING", "STAGE_OUT", "RESIZING"}
"""states of a job whose processes run"""
ACTIVE = RUNNING | {"PENDING", "CONFIGURING", "COMPLETING", "SUSPENDED", "REQUEUED", "REQUEUE_HOLD", "SPECIAL_EXIT"}
"""states of a job that has not ended"""
_WORKING = "idle,allocated,mixed,completing,reserved,planned"


_AWAY = re.compile(r"Unable to contact slurm controller|no answer within|Unexpected message received|timed out", re.I)
_PAUSE = 15.0  # seconds between tries while the controller is away

T = TypeVar("T")


class SlurmError(UserError):
    """Failure of a Slurm command: one line with the command and the reason."""


def retry_while_away(function: Callable[[], T], seconds: float) -> T:
    """Call a function of this module, and retry for ``seconds`` while the controller is away, as during its restart.

    Raises:
        SlurmError: it is away for longer, or the command fails for another reason.
    """
    end = time.monotonic() + seconds
    while True:
        try:
            return function()
        except SlurmError as error:
            if not _AWAY.search(str(error)) or time.monotonic() > end:
                raise
            log.warning("%s; retrying for %.0f s", error, end - time.monotonic())
            time.sleep(_PAUSE)


def call(program: str, *args: str, timeout: float = TIMEOUT) -> str:
    """Run a command and return its stdout.

    Raises:
        SlurmError: the command is not installed, does not answer within ``timeout`` seconds, or fails.
    """
    try:
        done = subprocess.run([program, *args], capture_output=True, text=True, timeout=timeout, check=False)
    except FileNotFoundError:
        raise SlurmError(
            f"{program}: not found; start this where Slurm's commands are (a login node, its module loaded), "
            f"or look at the script with --dry-run"
        ) from None
    except subprocess.TimeoutExpired:
        raise SlurmError(f"{program}: no answer within {timeout:g} s; is the controller up (scontrol ping)?") from None
    if "configuration source" in done.stderr:
        raise SlurmError(f"{program}: no cluster is configured here; use a login node, or set SLURM_CONF")
    if done.returncode:
        lines = [line.partition("error: ")[2] or line for line in done.stderr.splitlines() if line.strip()]
        # The first lines give the reason.
        raise SlurmError(f"{program}: {'; '.join(dict.fromkeys(lines[:2])) or f'exit code {done.returncode}'}")
    return done.stdout


def submit(script: Path, *options: str) -> int:
    """Submit a batch script and return the job's id.

    Raises:
        SlurmError: as :func:`call`.
    """
    answer = call("sbatch", "--parsable", *options, str(script))
    number = answer.strip().rpartition("\n")[2].partition(";")[0]  # a site's hook may print lines before it
    if not (number.isascii() and number.isdecimal()):
        raise SlurmError(f"sbatch: answered {shorten(answer)}, not a job's number; look at squeue")
    return int(number)


def job(number: int | str) -> dict[str, str] | None:
    """The controller's record of a job, with Slurm's field names (``JobState``, ``Reason``, ``Restarts``, ...).

    For a job array the first task's; None if the controller has forgotten the job.

    Raises:
        SlurmError: as :func:`call`.
    """
    return next(iter(tasks(number)), None)


def tasks(number: int | str) -> list[dict[str, str]]:
    """Records of all tasks of a job array; fields as in :func:`job`."""
    return _records("job", str(number))


def accounted(number: int | str) -> list[dict[str, str]]:
    """sacct's records of a job that the controller has forgotten; fields as in :func:`job`.

    Empty on a cluster without accounting.
    """
    names = {"JobState": "State", "RunTime": "Elapsed", "TimeLimit": "Timelimit", "NodeList": "NodeList"}
    try:
        text = call("sacct", "-X", "-n", "-P", "-j", str(number), "-o", ",".join(["JobID", *names.values()]))
    except SlurmError:
        return []
    return [
        dict(zip(["JobId", *names], line.split("|"))) for line in text.splitlines() if line.count("|") == len(names)
    ]


def partitions() -> dict[str, dict[str, str]]:
    """Records of all partitions by name, with Slurm's field names (``TotalNodes``, ``MaxTime``, ``Default``, ...)."""
    return {found["PartitionName"]: found for found in _records("partition")}


def working_nodes(partition: str | None) -> list[str]:
    """Nodes of a partition, or of all partitions, that can run jobs."""
    where = ["-p", partition] if partition else []
    return sorted(set(call("sinfo", "-h", "-N", "-o", "%N", "-t", _WORKING, *where).split()))


def broken_nodes(nodes: Sequence[str]) -> dict[str, str]:
    """State of each of these nodes that is down or does not respond."""
    states = dict(line.split(None, 1) for line in call("sinfo", "-h", "-N", "-o", "%N %T").splitlines() if line.strip())
    bad = re.compile(r"down|fail|not_responding|unknown|\*")
    return {node: states[node].strip() for node in nodes if bad.search(states.get(node, ""))}


def requeue(number: int | str) -> None:
    """Put a running job back into the queue; Slurm ends its processes."""
    call("scontrol", "requeue", str(number))


def exclude(number: int | str, nodes: Sequence[str]) -> None:
    """Set the excluded nodes of a pending job."""
    call("scontrol", "update", f"JobId={number}", f"ExcNodeList={','.join(nodes)}")


def hosts(text: str | None) -> list[str]:
    """Host names in a node field of Slurm, which is a host list, ``(null)`` or empty."""
    return expand_hosts(text) if text and text != "(null)" else []


def _records(kind: str, *names: str) -> list[dict[str, str]]:
    try:
        text = call("scontrol", "show", kind, "--oneliner", *names)
    except SlurmError as error:
        if "Invalid job id" in str(error):
            return []
        raise
    return [found for line in text.splitlines() if (found := _fields(line))]


def _fields(line: str) -> dict[str, str]:
    """``A=1 B=two words C=`` as a dictionary; a value ends where the next name begins."""
    found = re.findall(r"(?:^| )([A-Za-z][\w:/]*)=(.*?)(?= [A-Za-z][\w:/]*=|$)", line.strip())
    return {name: value.strip() for name, value in found}
