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
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro
from pydantic import Field

from bd3_megatron.config import ConfigError, Section
from pretrain import events, signals
from pretrain.checkpoint_files import COMPLETE, folders, step_of
from pretrain.ending import FAILED, MISTAKE, Ending, Word, fruitless_starts, judge, last_word
from pretrain.heartbeat import Listener
from pretrain.options import parse_options
from slurm import client
from slurm.client import SlurmError
from slurm.options import node_range

SUSPECTS = "suspects.json"  # what the preflight wrote before it ended with BAD_NODE

_LISTEN, _FORCE = 1.0, 60.0  # seconds between looks at the heartbeat, and until a hung command is killed


class AttemptOptions(Section):
    """Start a run's command and, where another start helps, put the Slurm job back into the queue afterwards.

    bd3 attempt RUN [OPTIONS] -- COMMAND...
    """

    run: Annotated[str, tyro.conf.Positional] = Field(description="run folder")
    restarts: int = Field(3, ge=0, description="starts without a new checkpoint after which to end")
    steps: int | None = Field(None, ge=1, description="do nothing where there is a checkpoint of this step or a later")
    fits: list[int] = Field(
        [],
        description="numbers of nodes that the layout fits, if the job may get several: of others some are left out",
    )


@dataclass(frozen=True)
class Job:
    """This job, by Slurm's variables; ``number`` is empty outside of Slurm."""

    number: str = ""
    restart: int = 0
    nodes: tuple[str, ...] = ()
    partition: str | None = None
    chain: str = ""
    """``<launch> <link> <links>`` in a chain of jobs"""
    environ: Mapping[str, str] = field(default_factory=dict, repr=False)

    @staticmethod
    def of(environ: Mapping[str, str]) -> Job:
        number = environ.get("SLURM_JOB_ID", "")
        if not number:
            return Job()
        return Job(
            number,
            int(environ.get("SLURM_RESTART_COUNT") or 0),
            tuple(client.hosts(environ.get("SLURM_JOB_NODELIST"))),
            environ.get("SLURM_JOB_PARTITION"),
            environ.get("BD3_CHAIN", ""),
        )

    @property
    def lineage(self) -> str:
        """What the starts are counted in: a job with its restarts, or a chain of jobs."""
        return self.chain.split()[0] if self.chain else self.number

    @property
    def has_successor(self) -> bool:
        """Whether another job of the chain waits for this one to end."""
        _, link, links = (self.chain or "0 1 1").split()
        return int(link) < int(links)


def main(args: list[str]) -> int:
    """`bd3 attempt`.

    Raises:
        ConfigError: one line for a mistake of the user.
    """
    if "--" not in args and not {"-h", "--help"} & set(args):
        raise ConfigError("bd3 attempt: no command; usage: bd3 attempt RUN [OPTIONS] -- COMMAND...")
    at = args.index("--") if "--" in args else len(args)
    options, command = parse_options(AttemptOptions, args[:at], "bd3 attempt"), args[at + 1 :]
    if not command:
        raise ConfigError("bd3 attempt: nothing after --; give the command that starts the run")
    run = Path(options.run)
    run.mkdir(parents=True, exist_ok=True)
    # Slurm tells the ranks to end; this process lives until they have.
    for number in signals.SIGNALS:
        signal.signal(number, lambda *_: None)
    while True:
        job = Job.of(os.environ)
        if options.steps is not None and newest_step(run) >= options.steps:
            say(f"{run}: already at step {newest_step(run)}: nothing to do")
            return 0
        if (refusal := settle(run, job, options.restarts)) is not None:
            say(refusal)
            return FAILED
        code, again = attempt(run, job, options, command)
        if not again or job.number:
            return code


def attempt(run: Path, job: Job, options: AttemptOptions, command: Sequence[str]) -> tuple[int, bool]:
    """One start of the command; its exit code, and whether it is to be started again."""
    begun = len(events.read(run))
    before = newest_step(run)
    events.record(
        run, "attempt", job=job.number, restart=job.restart, nodes=job.nodes, step=before, lineage=job.lineage
    )
    code, words = execute(fit(command, job, options.fits), run)
    ending = judge(code, words, events.read(run)[begun:], preflight_suspects(run, code), last_word(command))
    _record_end(run, job.number, job.restart, job.lineage, ending, before, code)
    if not ending.again:
        if ending.kind == "mistake":
            say(f"{run}: {ending.cause}; not started again, because it would end the same way")
            code = MISTAKE
        return code, False
    fruitless = fruitless_starts(events.read(run), job.lineage)
    if fruitless > options.restarts:
        say(given_up(run, fruitless, ending.cause))
        return code or FAILED, False
    if not job.number:
        again = ending.kind != "asked"
        say(f"{run}: {ending.cause}; {'started again' if again else 'ended'} at step {newest_step(run)}")
        return code, again
    return put_back(run, job, ending, code, options.fits), True


def put_back(run: Path, job: Job, ending: Ending, code: int, fits: Sequence[int] = ()) -> int:
    """Put the job back into the queue, unless somebody has done it or has ended the job; this job's exit code."""
    # Slurm ends the job's processes as soon as it is put back; the command that tells it the rest has to live on.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        found = client.job(job.number) or {}
        state, reason = found.get("JobState", "unknown"), found.get("Reason", "")
        if state not in client.RUNNING and reason != "TimeLimit":
            say(f"{run}: {ending.cause}; job {job.number} is {state}, and stays so")
            if _put_back_by_others(found, job) and ending.suspects:
                client.exclude(job.number, exclusions(job, ending, found, fits))
            return code
        if ending.kind == "asked" and job.has_successor:
            say(f"{run}: {ending.cause}; the next job of the chain goes on")
            return 0
        excluded = exclusions(job, ending, found, fits)
        added = sorted(set(ending.suspects) & set(excluded))
        without = f" without {', '.join(added)}" if added else ""
        say(f"{run}: {ending.cause}; job {job.number} goes back into the queue{without}, at step {newest_step(run)}")
        events.record(run, "requeued", job=job.number, excluded=added)
        try:
            client.requeue(job.number)
        except SlurmError:
            if not _put_back_by_others(client.job(job.number) or {}, job):  # done, though the command was ended by it
                raise
        if added:
            client.exclude(job.number, excluded)
    except SlurmError as error:
        say(f"{run}: {ending.cause}; cannot put job {job.number} back: {error}; submit its script again")
        return code or FAILED
    return code


def _put_back_by_others(found: Mapping[str, str], job: Job) -> bool:
    return int(found.get("Restarts", "0")) > job.restart


def exclusions(job: Job, ending: Ending, found: Mapping[str, str], fits: Sequence[int] = ()) -> list[str]:
    """Nodes that the job is to keep away from: as before, and the suspects if it can go on without them."""
    before = client.hosts(found.get("ExcNodeList"))
    added = set(ending.suspects) - set(before)
    if not added:
        return before
    least = min(fits, default=node_range(found.get("NumNodes", "1"))[0] or 1)
    left = set(client.working_nodes(job.partition)) - added - set(before)
    if added & set(client.hosts(found.get("ReqNodeList"))):
        reason = "the job asks for it by name"
    elif len(left) < least:
        reason = f"partition {job.partition} would have {len(left)} nodes left, and the job needs {least}"
    else:
        return sorted(added | set(before))
    say(f"{', '.join(sorted(added))}: not excluded, although to blame: {reason}")
    return before


def execute(command: Sequence[str], run: Path) -> tuple[int, list[Word]]:
    """Run a command to its end, or end it when the run's heart has stopped.

    Returns:
        its exit code (128 + signal, as of a shell), and what it wrote to stderr.
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

    watcher = threading.Thread(target=listen, daemon=True)
    watcher.start()
    for line in process.stderr:
        sys.stderr.write(line)
        sys.stderr.flush()
        words = [*words[-999:], Word(time.monotonic() - begin, line.rstrip("\n"))]
    code = process.wait()
    over.set()
    watcher.join()
    return (128 - code if code < 0 else code), words


def settle(run: Path, job: Job, restarts: int) -> str | None:
    """Close the record of an earlier attempt that had no chance to, and say why no other should follow, if so."""
    happened = events.read(run)
    at = next((n for n in reversed(range(len(happened))) if happened[n]["event"] in ("attempt", "ended")), None)
    if at is not None and happened[at]["event"] == "attempt" and not _goes_on(happened[at]["job"], job):
        lost = happened[at]
        ending = _from_outside(lost, happened[at:])
        _record_end(run, lost["job"], lost["restart"], lost["lineage"], ending, lost["step"])
        happened = events.read(run)
    fruitless = fruitless_starts(happened, job.lineage)
    if fruitless > restarts:
        causes = [event.get("cause", "") for event in happened if event["event"] == "ended"]
        return given_up(run, fruitless, causes[-1])
    return None


def _goes_on(number: str, job: Job) -> bool:
    """Whether a job that is not this one still does something."""
    if not number or number == job.number:
        return False
    try:
        return (client.job(number) or {}).get("JobState") in client.ACTIVE
    except SlurmError as error:
        say(str(error))
        return False


def _from_outside(lost: Mapping[str, Any], happened: Sequence[Mapping[str, Any]]) -> Ending:
    """How an attempt ended whose `bd3 attempt` was ended, too."""
    known = judge(FAILED, [], happened)
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
    return max((step_of(path) for path in folders(run) if (path / COMPLETE).is_file()), default=0)


def preflight_suspects(run: Path, code: int) -> dict[str, str] | None:
    """Reasons by host that the preflight of this attempt has left; no later one finds them."""
    path = run / SUSPECTS
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
