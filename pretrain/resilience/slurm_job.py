"""The Slurm job of a run: its identity, its requeue, and the nodes to exclude after it."""

from __future__ import annotations

import logging
import os
import signal
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bd3_common import exit_codes
from pretrain.resilience.exit_reason import ExitReason
from pretrain.resilience.progress import newest_step
from pretrain.run_folder import events
from slurm import client
from slurm.client import SlurmError
from slurm.environment import CHAIN
from slurm.options import node_range

log = logging.getLogger(__name__)

_STARTED = f"{os.getpid()} {time.time():.0f}"
_CONTROLLER_AWAY = 600.0  # seconds that the controller may be away before requeueing is given up


@dataclass(frozen=True)
class SlurmJob:
    """A job as Slurm's variables describe it; ``number`` is empty outside of Slurm.

    A task of a job array is named ``12_3``, not by its SLURM_JOB_ID: in the last task that is the array's own id, with
    which scontrol shows and requeues all tasks.
    """

    number: str = ""
    restart: int = 0
    nodes: tuple[str, ...] = ()
    partition: str | None = None
    chain: str = ""
    """``<launch> <link> <links>`` in a chain of jobs"""

    @staticmethod
    def from_environ(environ: Mapping[str, str]) -> SlurmJob:
        """The job that a process with these variables belongs to."""
        number = environ.get("SLURM_JOB_ID", "")
        if not number:
            return SlurmJob()
        array, task = environ.get("SLURM_ARRAY_JOB_ID"), environ.get("SLURM_ARRAY_TASK_ID")
        return SlurmJob(
            f"{array}_{task}" if array and task else number,
            int(environ.get("SLURM_RESTART_COUNT") or 0),
            tuple(client.hosts(environ.get("SLURM_JOB_NODELIST"))),
            environ.get("SLURM_JOB_PARTITION"),
            environ.get(CHAIN, ""),
        )

    @property
    def lineage(self) -> str:
        """Name under which starts are counted: the chain of jobs, else the job; outside of Slurm this process."""
        return self.chain.split()[0] if self.chain else self.number or f"{socket.gethostname()} {_STARTED}"

    @property
    def has_successor(self) -> bool:
        """True if another job of the chain waits for the end of this one."""
        _, link, links = (self.chain or "0 1 1").split()
        return int(link) < int(links)


def requeue(run: Path, job: SlurmJob, reason: ExitReason, code: int, fits: Sequence[int] = ()) -> int:
    """Requeue the job, unless it has been requeued or ended already.

    Args:
        code: exit code of the command.
        fits: node counts that the layout fits; empty: any.

    Returns:
        the exit code of this job's batch script.
    """
    # Slurm sends SIGTERM when the job is requeued; this process must survive it to set the excluded nodes.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        found = client.retry_while_away(lambda: client.job(job.number), _CONTROLLER_AWAY) or {}
        state = found.get("JobState", "unknown")
        if state not in client.RUNNING and found.get("Reason", "") != "TimeLimit":
            log.warning("%s: %s; job %s is %s, and stays so", run, reason.cause, job.number, state)
            if _requeued_by_others(found, job):
                _record_requeue(run, job, nodes_to_exclude(job, reason, found, fits), found)
            return code
        if reason.kind == "asked" and job.has_successor:
            log.info("%s: %s; the next job of the chain goes on", run, reason.cause)
            return 0
        added = nodes_to_exclude(job, reason, found, fits)
        without = f" without {', '.join(added)}" if added else ""
        text = f"job {job.number} goes back into the queue{without}, at step {newest_step(run)}"
        log.info("%s: %s; %s", run, reason.cause, text)
        try:
            client.retry_while_away(lambda: client.requeue(job.number), _CONTROLLER_AWAY)
        except SlurmError:
            # scontrol may have been killed by the very requeue that it requested.
            if not _requeued_by_others(client.job(job.number) or {}, job):
                raise
    except SlurmError as error:
        text = f"cannot put job {job.number} back: {error}; submit its script again"
        log.warning("%s: %s; %s", run, reason.cause, text)
        return code or exit_codes.FAILED
    _record_requeue(run, job, added, found)
    return code


def nodes_to_exclude(
    job: SlurmJob, reason: ExitReason, found: Mapping[str, str], fits: Sequence[int] = ()
) -> list[str]:
    """Nodes to exclude from the next start: the bad hosts, if enough nodes are left without them.

    Args:
        found: the job's record, as :func:`slurm.client.job` returns it.
        fits: node counts that the layout fits; empty: any.
    """
    before = set(client.hosts(found.get("ExcNodeList")))
    # A host may report its fully qualified name, where Slurm uses the short one.
    bad = {node for host in reason.bad_hosts for node in (host, host.partition(".")[0]) if node in job.nodes}
    added = bad - before
    if not added:
        return []
    least = min(fits, default=node_range(found.get("NumNodes", "1"))[0] or 1)
    left: set[str] = set()
    try:
        left = set(client.working_nodes(job.partition)) - added - before
    except SlurmError as error:
        obstacle = str(error)
    else:
        obstacle = f"partition {job.partition} would have {len(left)} nodes left, and the job needs {least}"
    if added & set(client.hosts(found.get("ReqNodeList"))):
        obstacle = "the job asks for it by name"
    elif len(left) >= least:
        return sorted(added)
    log.warning("%s: not excluded, although to blame: %s", ", ".join(sorted(added)), obstacle)
    return []


def _record_requeue(run: Path, job: SlurmJob, added: Sequence[str], found: Mapping[str, str]) -> None:
    """Record the requeue and set the excluded nodes, which Slurm accepts for pending jobs only."""
    try:
        if added:
            client.exclude(job.number, sorted({*added, *client.hosts(found.get("ExcNodeList"))}))
    except SlurmError as error:
        log.warning("%s: not excluded, although to blame: %s", ", ".join(added), error)
        added = ()
    events.record(run, "requeued", job=job.number, excluded=added)


def _requeued_by_others(found: Mapping[str, str], job: SlurmJob) -> bool:
    return int(found.get("Restarts", "0")) > job.restart
