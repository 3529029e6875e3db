"""Supervisor of a run (`bd3 attempt RUN -- COMMAND`): starts the command, finds the exit reason, restarts it or not.

It is the last line of a batch script. It starts the command (``srun ... bd3 pretrain ...``), finds the exit reason from
the exit code, srun's messages and the run folder, and requeues the job where a restart can help: after a warning of
the time limit, a failure or a hang, without the nodes that failed. A user's mistake, a finished run and too many
starts without a new checkpoint end the job. Without Slurm the supervisor restarts the command itself.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field

from bd3_common import exit_codes, schema
from bd3_common.errors import UserError
from bd3_common.schema import OpenRecord
from pretrain.resilience.child_process import SignalForwarder, run_command
from pretrain.resilience.exit_reason import ExitReason, exit_reason, last_log_line
from pretrain.resilience.progress import finished, newest_step, starts_without_progress
from pretrain.resilience.slurm_job import SlurmJob, requeue
from pretrain.run_folder import events
from pretrain.run_folder.events import Host
from pretrain.run_folder.layout import BAD_NODES
from slurm import client
from slurm.client import SlurmError

log = logging.getLogger(__name__)


class BadNodes(OpenRecord):
    """The preflight's file of bad nodes."""

    hosts: list[Host]
    reasons: dict[str, str] = Field(default={})


def supervise(
    run: Path, command: Sequence[str], restarts: int, steps: int | None = None, fits: Sequence[int] = ()
) -> int:
    """Start the command until it is done or a restart cannot help; under Slurm once, because a requeue restarts it.

    Args:
        run: the run folder; created if missing.
        restarts: starts without a new checkpoint after which to give up.
        steps: do nothing if the run has a checkpoint of this step or a later one.
        fits: node counts that the layout fits; empty: any.

    Returns:
        the exit code of the batch script.

    Raises:
        ConfigError: the command cannot be started.
    """
    run.mkdir(parents=True, exist_ok=True)
    forwarder = SignalForwarder(in_job="SLURM_JOB_ID" in os.environ)
    while True:
        job = SlurmJob.from_environ(os.environ)
        if steps is not None and finished(run, steps):
            log.info("%s: already at step %d: nothing to do", run, newest_step(run))
            return 0
        if (refusal := reason_not_to_start(run, job, restarts)) is not None:
            log.warning("%s", refusal)
            return exit_codes.FAILED
        code, again = start_once(run, job, command, forwarder, restarts, fits)
        if not again or job.number:
            return code


def start_once(
    run: Path,
    job: SlurmJob,
    command: Sequence[str],
    forwarder: SignalForwarder,
    restarts: int,
    fits: Sequence[int] = (),
) -> tuple[int, bool]:
    """Start the command once; return its exit code, and True if it should be restarted."""
    take_bad_nodes(run, 0)  # left by an earlier `bd3 preflight`, or by a start that was killed
    begun = len(events.read(run))
    before = newest_step(run)
    events.record(
        run, "attempt", job=job.number, restart=job.restart, nodes=job.nodes, step=before, lineage=job.lineage
    )
    code, slurm_lines = run_command(fit_nodes(command, job, fits), run, forwarder)
    happened = events.read(run)[begun:]
    reason = exit_reason(code, slurm_lines, happened, take_bad_nodes(run, code), last_log_line(command))
    _record_end(run, job.number, job.restart, job.lineage, reason, before, code)
    if not reason.may_restart:
        if reason.kind == "mistake":
            log.warning("%s: %s; not started again, because it would end the same way", run, reason.cause)
            code = exit_codes.USAGE_ERROR
        return code, False
    starts = starts_without_progress(events.read(run), job.lineage)
    if starts > restarts:
        log.warning("%s", _gives_up(run, starts, reason.cause))
        return code or exit_codes.FAILED, False
    if not job.number:
        again = reason.kind != "asked" and not forwarder.stop_requested
        what = "started again" if again else "ended"
        log.info("%s: %s; %s at step %d", run, reason.cause, what, newest_step(run))
        return code, again
    return requeue(run, job, reason, code, fits), True


def reason_not_to_start(run: Path, job: SlurmJob, restarts: int) -> str | None:
    """Message if the run must not be started now: another job uses its folder, or too many starts made no progress.

    If the supervisor of the last start was killed, the end of that start is recorded first.
    """
    happened = events.read(run)
    at = next((n for n in reversed(range(len(happened))) if happened[n]["event"] in ("attempt", "ended")), None)
    if at is not None and happened[at]["event"] == "attempt":
        lost = happened[at]
        number = lost.get("job") or ""
        state = _state_of_other(number, job)
        if state in client.RUNNING:
            return f"{run}: job {number} is {state} in it; wait for it, or end it with: scancel {number}"
        if state not in client.ACTIVE:
            reason = _reason_without_supervisor(lost, happened[at:])
            restart, before = lost.get("restart") or 0, lost.get("step") or 0
            _record_end(run, number, restart, lost.get("lineage", ""), reason, before)
            happened = events.read(run)
    starts = starts_without_progress(happened, job.lineage)
    if starts > restarts:
        causes = [event.get("cause") or "" for event in happened if event["event"] == "ended"]
        return _gives_up(run, starts, causes[-1])
    return None


def fit_nodes(command: Sequence[str], job: SlurmJob, fits: Sequence[int]) -> list[str]:
    """The command with srun's ``--nodes`` lowered to the largest node count that the layout fits."""
    able = [count for count in fits if count <= len(job.nodes)]
    if not job.nodes or not able or max(able) == len(job.nodes):
        return list(command)
    idle = ", ".join(job.nodes[max(able) :])
    log.info("%d nodes: the layout fits %d of them; %s stay idle", len(job.nodes), max(able), idle)
    return [f"--nodes={max(able)}" if word.startswith("--nodes=") else word for word in command]


def take_bad_nodes(run: Path, code: int) -> dict[str, str] | None:
    """Read and delete the preflight's file of bad nodes: reasons by host.

    None if there is no file, if it is malformed, or if ``code`` is 0. It is deleted so that no later start finds it.
    """
    path = run / BAD_NODES
    reasons: dict[str, str] | None = None
    try:
        found = schema.read(path, BadNodes)
        reasons = {host: found.reasons.get(host, "") for host in found.hosts}
    except FileNotFoundError:
        return None
    except (UserError, OSError):
        pass
    with contextlib.suppress(OSError):  # a folder of that name: nothing of ours
        path.unlink(missing_ok=True)
    return reasons if code else None


def _state_of_other(number: str, job: SlurmJob) -> str | None:
    """State of another job; None if it is this job or its state is unknown."""
    if not number or number == job.number:
        return None
    try:
        return (client.job(number) or {}).get("JobState")
    except SlurmError as error:
        log.warning("%s", error)
        return None


def _reason_without_supervisor(lost: Mapping[str, Any], happened: Sequence[Mapping[str, Any]]) -> ExitReason:
    """The exit reason of a start whose supervisor was killed with it."""
    known = exit_reason(exit_codes.FAILED, [], happened)
    if known.kind != "failed":
        return known
    broken: dict[str, str] = {}
    if lost.get("job"):
        try:
            broken = client.broken_nodes(lost.get("nodes", ()))
        except SlurmError as error:
            log.warning("%s", error)
    if broken:
        named = ", ".join(f"{node} is {state}" for node, state in broken.items())
        return ExitReason("failed", f"node failure: {named}", tuple(broken))
    return ExitReason("failed", "ended from outside: a node failure, preemption or a kill")


def _gives_up(run: Path, starts: int, cause: str) -> str:
    return (
        f"{run}: {starts} starts in a row without a new checkpoint, at step {newest_step(run)}; the last: {cause}; "
        f"mend that and submit again, or raise --restarts"
    )


def _record_end(
    run: Path, number: str, restart: int, lineage: str, reason: ExitReason, before: int, code: int | None = None
) -> None:
    events.record(
        run,
        "ended",
        job=number,
        restart=restart,
        lineage=lineage,
        code=code,
        kind=reason.kind,
        cause=reason.cause,
        suspects=reason.bad_hosts,
        before=before,
        step=newest_step(run),
    )
