"""`bd3 attempt RUN -- COMMAND`: one start of a run, and what to do when it ends.

The batch script ends with it. It starts the command (``srun ... bd3 pretrain ...``), reads how that ended from its exit
code, from srun's words and from what the ranks left in the run folder, and puts the job back into Slurm's queue where
another start can help: after a warning of the time limit, after a failure, after a hang; without the nodes that failed.
A user's mistake, a finished run and too many starts without a new checkpoint end the job. Without Slurm the command is
started again in place.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bd3_common import exit_codes
from bd3_common.errors import ConfigError
from pretrain.checkpoint.folder import newest_complete, step_of
from pretrain.resilience import signals
from pretrain.resilience.exit_reason import Ending, Word, fruitless_starts, judge, last_word
from pretrain.resilience.heartbeat import Listener
from pretrain.run_folder import events
from pretrain.run_folder.layout import BAD_NODES
from slurm import client
from slurm.client import SlurmError
from slurm.options import node_range

_STARTED = f"{os.getpid()} {time.time():.0f}"
_LISTEN, _FORCE = 1.0, 60.0  # seconds between looks at the heartbeat, and until a hung command is killed
_LEFT_OPEN = 5.0  # seconds that a command's stderr is read on after its end: what it left running may hold it open
_WORDS = 10_000  # lines of Slurm's that are kept
_CONTROLLER = 600.0  # seconds that a controller may be away before a job is not put back


@dataclass(frozen=True)
class Job:
    """This job, by Slurm's variables; ``number`` is empty outside of Slurm.

    A task of a job array is ``12_3``: the last one has the array's own number in SLURM_JOB_ID, by which scontrol would
    show, and requeue, all of them.
    """

    number: str = ""
    restart: int = 0
    nodes: tuple[str, ...] = ()
    partition: str | None = None
    chain: str = ""
    """``<launch> <link> <links>`` in a chain of jobs"""

    @staticmethod
    def of(environ: Mapping[str, str]) -> Job:
        number = environ.get("SLURM_JOB_ID", "")
        if not number:
            return Job()
        array, task = environ.get("SLURM_ARRAY_JOB_ID"), environ.get("SLURM_ARRAY_TASK_ID")
        return Job(
            f"{array}_{task}" if array and task else number,
            int(environ.get("SLURM_RESTART_COUNT") or 0),
            tuple(client.hosts(environ.get("SLURM_JOB_NODELIST"))),
            environ.get("SLURM_JOB_PARTITION"),
            environ.get("BD3_CHAIN", ""),
        )

    @property
    def lineage(self) -> str:
        """What starts are counted in: a job with its restarts, a chain of jobs, or outside of Slurm this process."""
        return self.chain.split()[0] if self.chain else self.number or f"{socket.gethostname()} {_STARTED}"

    @property
    def has_successor(self) -> bool:
        """Whether another job of the chain waits for this one to end."""
        _, link, links = (self.chain or "0 1 1").split()
        return int(link) < int(links)


class Asked:
    """The signals that this process gets. It lives until the command has ended, whatever they are.

    Slurm tells the ranks of a job itself, but SIGUSR1 may be meant for the batch script (``--signal=B:USR1@300``): srun
    passes it on, while SIGTERM would let it kill them. Outside of a job SIGTERM is passed on, too; Ctrl-C is not,
    because a terminal sends it to all.
    """

    def __init__(self, in_job: bool):
        self.signals: set[int] = set()
        self.process: subprocess.Popen | None = None
        self._passed_on = {signal.SIGUSR1} if in_job else {signal.SIGUSR1, signal.SIGTERM}
        for number in signals.SIGNALS:
            signal.signal(number, self._note)

    @property
    def to_end(self) -> bool:
        """Whether somebody wants this to be over."""
        return bool(self.signals & {signal.SIGTERM, signal.SIGINT})

    def _note(self, number: int, frame: object) -> None:
        self.signals.add(number)
        if self.process is not None and number in self._passed_on:
            self.process.send_signal(number)


def attempt(
    run: Path, job: Job, command: Sequence[str], asked: Asked, restarts: int, fits: Sequence[int] = ()
) -> tuple[int, bool]:
    """One start of the command; its exit code, and whether it is to be started again."""
    preflight_suspects(run, 0)  # of a `bd3 preflight` by hand, or of an attempt that was killed
    begun = len(events.read(run))
    before = newest_step(run)
    events.record(
        run, "attempt", job=job.number, restart=job.restart, nodes=job.nodes, step=before, lineage=job.lineage
    )
    code, words = execute(fit(command, job, fits), run, asked)
    ending = judge(code, words, events.read(run)[begun:], preflight_suspects(run, code), last_word(command))
    _record_end(run, job.number, job.restart, job.lineage, ending, before, code)
    if not ending.again:
        if ending.kind == "mistake":
            say(f"{run}: {ending.cause}; not started again, because it would end the same way")
            code = exit_codes.USAGE_ERROR
        return code, False
    fruitless = fruitless_starts(events.read(run), job.lineage)
    if fruitless > restarts:
        say(given_up(run, fruitless, ending.cause))
        return code or exit_codes.FAILED, False
    if not job.number:
        again = ending.kind != "asked" and not asked.to_end
        say(f"{run}: {ending.cause}; {'started again' if again else 'ended'} at step {newest_step(run)}")
        return code, again
    return put_back(run, job, ending, code, fits), True


def put_back(run: Path, job: Job, ending: Ending, code: int, fits: Sequence[int] = ()) -> int:
    """Put the job back into the queue, unless somebody has done it or has ended the job; this job's exit code."""
    # Slurm ends the job's processes as soon as it is put back; the command that tells it the rest has to live on.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        found = client.patiently(lambda: client.job(job.number), _CONTROLLER, say) or {}
        state, reason = found.get("JobState", "unknown"), found.get("Reason", "")
        if state not in client.RUNNING and reason != "TimeLimit":
            say(f"{run}: {ending.cause}; job {job.number} is {state}, and stays so")
            if _put_back_by_others(found, job):
                _requeued(run, job, exclusions(job, ending, found, fits), found)
            return code
        if ending.kind == "asked" and job.has_successor:
            say(f"{run}: {ending.cause}; the next job of the chain goes on")
            return 0
        added = exclusions(job, ending, found, fits)
        without = f" without {', '.join(added)}" if added else ""
        say(f"{run}: {ending.cause}; job {job.number} goes back into the queue{without}, at step {newest_step(run)}")
        try:
            client.patiently(lambda: client.requeue(job.number), _CONTROLLER, say)
        except SlurmError:
            if not _put_back_by_others(client.job(job.number) or {}, job):  # done, though the command was ended by it
                raise
    except SlurmError as error:
        say(f"{run}: {ending.cause}; cannot put job {job.number} back: {error}; submit its script again")
        return code or exit_codes.FAILED
    _requeued(run, job, added, found)
    return code


def _requeued(run: Path, job: Job, added: Sequence[str], found: Mapping[str, str]) -> None:
    """The job is back in the queue: keep it away from further nodes, which Slurm takes of pending jobs only."""
    try:
        if added:
            client.exclude(job.number, sorted({*added, *client.hosts(found.get("ExcNodeList"))}))
    except SlurmError as error:
        say(f"{', '.join(added)}: not excluded, although to blame: {error}")
        added = ()
    events.record(run, "requeued", job=job.number, excluded=added)


def _put_back_by_others(found: Mapping[str, str], job: Job) -> bool:
    return int(found.get("Restarts", "0")) > job.restart


def exclusions(job: Job, ending: Ending, found: Mapping[str, str], fits: Sequence[int] = ()) -> list[str]:
    """Nodes that the job is to keep away from from now on: the suspects, if it can go on without them."""
    before = set(client.hosts(found.get("ExcNodeList")))
    # Hosts may call themselves otherwise than Slurm does, by a whole domain name most often.
    suspects = {node for host in ending.suspects for node in (host, host.partition(".")[0]) if node in job.nodes}
    added = suspects - before
    if not added:
        return []
    least = min(fits, default=node_range(found.get("NumNodes", "1"))[0] or 1)
    try:
        left = set(client.working_nodes(job.partition)) - added - before
    except SlurmError as error:
        left, reason = set(), str(error)
    else:
        reason = f"partition {job.partition} would have {len(left)} nodes left, and the job needs {least}"
    if added & set(client.hosts(found.get("ReqNodeList"))):
        reason = "the job asks for it by name"
    elif len(left) >= least:
        return sorted(added)
    say(f"{', '.join(sorted(added))}: not excluded, although to blame: {reason}")
    return []


def execute(command: Sequence[str], run: Path, asked: Asked | None = None) -> tuple[int, list[Word]]:
    """Run a command to its end, or end it when the run's heart has stopped.

    Returns:
        its exit code (128 + signal, as of a shell), and what Slurm's programs wrote to its stderr.
    """
    begin, words, over = time.monotonic(), [], threading.Event()
    listener = Listener(run)
    try:
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, errors="replace")
    except OSError as error:
        raise ConfigError(f"{command[0]}: {error.strerror}; give the command that starts the run after --") from None

    def listen() -> None:
        while not over.wait(_LISTEN):
            if (trouble := listener.trouble(time.monotonic())) is not None:
                events.record(run, "hang", text=trouble, hosts=[])
                process.terminate()  # srun ends all tasks, those that do not heed it by force
                if not over.wait(_FORCE):
                    process.kill()
                return

    def read() -> None:
        for line in process.stderr:
            sys.stderr.write(line)
            sys.stderr.flush()
            if line.startswith(("srun:", "slurmstepd")) and len(words) < _WORDS:
                words.append(Word(time.monotonic() - begin, line.rstrip("\n")))

    if asked is not None:
        asked.process = process
    watcher, reader = (threading.Thread(target=function, daemon=True) for function in (listen, read))
    watcher.start()
    reader.start()
    code = process.wait()
    over.set()
    watcher.join()
    reader.join(_LEFT_OPEN)
    if asked is not None:
        asked.process = None
    return (128 - code if code < 0 else code), list(words)


def settle(run: Path, job: Job, restarts: int) -> str | None:
    """Close the record of an earlier attempt that had no chance to, and say why no other should follow, if so."""
    happened = events.read(run)
    at = next((n for n in reversed(range(len(happened))) if happened[n]["event"] in ("attempt", "ended")), None)
    if at is not None and happened[at]["event"] == "attempt":
        lost = happened[at]
        state = _state_of(lost["job"], job)
        if state in client.RUNNING:
            return f"{run}: job {lost['job']} is {state} in it; wait for it, or end it with: scancel {lost['job']}"
        if state not in client.ACTIVE:
            ending = _from_outside(lost, happened[at:])
            _record_end(run, lost["job"], lost["restart"], lost["lineage"], ending, lost["step"])
            happened = events.read(run)
    fruitless = fruitless_starts(happened, job.lineage)
    if fruitless > restarts:
        causes = [event.get("cause", "") for event in happened if event["event"] == "ended"]
        return given_up(run, fruitless, causes[-1])
    return None


def _state_of(number: str, job: Job) -> str | None:
    """State of a job that is not this one."""
    if not number or number == job.number:
        return None
    try:
        return (client.job(number) or {}).get("JobState")
    except SlurmError as error:
        say(str(error))
        return None


def _from_outside(lost: Mapping[str, Any], happened: Sequence[Mapping[str, Any]]) -> Ending:
    """How an attempt ended whose `bd3 attempt` was ended, too."""
    known = judge(exit_codes.FAILED, [], happened)
    if known.kind != "failed":
        return known
    broken: dict[str, str] = {}
    if lost["job"]:
        try:
            broken = client.broken_nodes(lost.get("nodes", ()))
        except SlurmError as error:
            say(str(error))
    if broken:
        named = ", ".join(f"{node} is {state}" for node, state in broken.items())
        return Ending("failed", f"node failure: {named}", tuple(broken))
    return Ending("failed", "ended from outside: a node failure, preemption or a kill")


def given_up(run: Path, starts: int, cause: str) -> str:
    """The line that says why there is no further start."""
    return (
        f"{run}: {starts} starts in a row without a new checkpoint, at step {newest_step(run)}; the last: {cause}; "
        f"mend that and submit again, or raise --restarts"
    )


def fit(command: Sequence[str], job: Job, fits: Sequence[int]) -> list[str]:
    """The command with as many of the job's nodes as the layout fits: srun's ``--nodes`` is lowered."""
    able = [count for count in fits if count <= len(job.nodes)]
    if not job.nodes or not able or max(able) == len(job.nodes):
        return list(command)
    say(f"{len(job.nodes)} nodes: the layout fits {max(able)} of them; {', '.join(job.nodes[max(able) :])} stay idle")
    return [f"--nodes={max(able)}" if word.startswith("--nodes=") else word for word in command]


def newest_step(run: Path) -> int:
    """Step of the newest complete checkpoint; 0 if there is none."""
    found = newest_complete(run)
    return step_of(found) if found else 0


def finished(run: Path, steps: int) -> bool:
    """Whether a run has nothing left to do. One that was stopped in its last evaluation has that."""
    if newest_step(run) < steps:
        return False
    ends = [e for e in events.read(run) if e["event"] in ("stopped", "finished") or e.get("kind") == "done"]
    return not ends or ends[-1]["event"] != "stopped"


def preflight_suspects(run: Path, code: int) -> dict[str, str] | None:
    """Reasons by host that the preflight of this attempt has left; no later one finds them."""
    path = run / BAD_NODES
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text())
        reasons = {str(host): str(found.get("reasons", {}).get(host, "")) for host in found["hosts"]}
    except (ValueError, KeyError, TypeError, AttributeError):
        reasons = None
    path.unlink(missing_ok=True)
    return reasons if code else None


def say(text: str) -> None:
    """A line for the job's log."""
    print(f"bd3 attempt: {text}", file=sys.stderr, flush=True)


def _record_end(
    run: Path, number: str, restart: int, lineage: str, ending: Ending, before: int, code: int | None = None
) -> None:
    events.record(
        run,
        "ended",
        job=number,
        restart=restart,
        lineage=lineage,
        code=code,
        kind=ending.kind,
        cause=ending.cause,
        suspects=ending.suspects,
        before=before,
        step=newest_step(run),
    )
